"""What `align doctor` looks at: data, fit, speed and memory, each in a module of its own."""
