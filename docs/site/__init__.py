"""The documentation site, made of the pages of this repository and of the package itself."""
