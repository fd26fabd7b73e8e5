"""For tests, this project's and yours: small models and hypothesis strategies."""
