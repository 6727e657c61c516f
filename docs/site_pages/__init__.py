"""The site's pages, put together from the repository's texts, specs and docstrings; `docs/build_site.py` builds it."""
