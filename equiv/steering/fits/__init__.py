"""Forms of steering fitted to a shift at the site itself."""
