"""Recording and online CMD in trainers of others; each module needs its extra, such as ``trajkit[transformers]``."""
