"""Which sites, layers and ranks to spend a budget of parameters on."""
