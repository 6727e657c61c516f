"""The API: a page for each subject; every public name stands on one, and its text is its docstring."""

from __future__ import annotations

import tnpeft
from site_pages.links import Links

__all__ = ["PAGES", "write_api"]

PAGES = {
    "Attach and train": "attach Handle Report Adapter compile accumulating rows memory_limit anchor",
    "Switch, merge, detach": "activate serving disabled merge unmerge detach names_of scales_of plain_state_dict",
    "Files": "save load hot_swap inspect Inspection save_foreign load_foreign",
    "Specs, networks, recipes": "Spec Network Layer Recipe load_spec load_recipe list_specs list_recipes layer_of "
    "register_init register_map draw_network plan Plan",
    "Fit and search": "fit Fit extract Extraction truncate Truncation budget Budget tangent_space TangentSpace "
    "search Search search_report",
    "Errors": "TnpeftError SpecError BindError AttachError ExecutionError AdapterFileError DrawError TnpeftWarning "
    "Problem Position",
}
_MODULES = {
    "tnpeft.testing": "Tests of specs of your own: `pip install 'tnpeft[testing]'`.",
    "tnpeft.integrations.transformers": "For transformers' `Trainer`.",
}


def write_api(links: Links) -> None:
    """Write `api/`; a public name without a page, or a page's name that is not public, is a mistake."""
    listed = [name for names in PAGES.values() for name in names.split()]
    odd = sorted(set(listed) ^ (set(tnpeft.__all__) - {"__version__"}))
    if odd or len(listed) != len(set(listed)):
        raise ValueError(f"names that the API's pages and tnpeft.__all__ do not share, or name twice: {', '.join(odd)}")
    for title, names in PAGES.items():
        texts = "\n".join(f"::: tnpeft.{name}\n" for name in names.split())
        links.write(page_for(title), f"# {title}\n\n{texts}", "docs/README.md")
    modules = "\n".join(f"## {name}\n\n{text}\n\n::: {name}\n" for name, text in _MODULES.items())
    links.write("api/modules.md", f"# Modules imported by name\n\n{modules}", "docs/README.md")


def page_for(title: str) -> str:
    """The page's path in the site."""
    return f"api/{title.lower().replace(',', '').replace(' ', '_')}.md"
