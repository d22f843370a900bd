"""What a data set holds and what is wrong with it: headers, every sample, and a sound copy.

| module | holds |
|---|---|
| `survey` | what the manifest tells, without reading a sample; what disagrees with it |
| `examine` | samples read and decoded: damage, sizes, captions |
| `repair` | the good samples as records to be packed anew |
"""
