"""Claims about trained models: the studies that train them, and what they found."""
