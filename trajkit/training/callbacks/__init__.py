"""Recording from trainers of other libraries; each module needs its extra, such as ``trajkit[transformers]``."""
