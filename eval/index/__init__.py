"""FAISS indexes over embedding tables: chosen, tuned against exact search, checked on opening.

An index folder stands alone (the table may be moved or deleted):

    index.json                 the card: what is there and what it reaches; names all other files
    index.faiss                unit-length vectors under the inner product
    img_emb/img_emb_0.npy      the vectors themselves, as in the table: row i belongs to vector i
    metadata/metadata_0.parquet    their metadata
    rows-0.arrow               the same, laid out to be mapped into memory
    ids-0.npy                  their ids
    queries-0.npz              the queries that measured it, for measuring it again after a change
    lists-0.ivfdata            inverted lists, where it was built in shares (then used from disk)
    removed-1.npy              numbers of the rows that no search finds any more

A change (rows added, removed, compacted) writes new files and then replaces the card, so that a
reader sees the index before or after it. Open only indexes you trust: FAISS reads its own files
without regard for hostile bytes.
"""
