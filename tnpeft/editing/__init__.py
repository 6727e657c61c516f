"""Specs while they are written: mistakes with their places, the picture that follows, and a page around them.

What a text says (`reading`, `completion`, `hover`, `live_picture`, `facts`) knows no page. The page, the language
server and `--watch` are three ways to it.
"""
