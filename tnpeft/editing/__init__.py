"""Specs while they are written: mistakes with their places, the picture that follows, and a page around them.

The modules that read a text (`reading`, `completion`, `hover`, `live_picture`, `facts`) know no page. The page, the
language server and `--watch` use them.
"""
