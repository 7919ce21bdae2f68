"""The page on which a reader finds the documentation of other versions.

The published site is that of the main branch, with a folder for each release (``v0.1.0/``) as it was built when it was released.
"""

from packaging.version import Version


def page(version: str, address: str, releases: list[str]) -> str:
    """The Markdown of the page.

    Args:
        version: of the package that is documented.
        address: of this build; empty where it is not to be published, ending in ``v<version>/`` for a release's own.
        releases: tags such as ``v0.1.0``, in any order, whose documentation is published beside this build.
    """
    site = address.removesuffix(f"v{version}/")
    if site != address:
        text = f"These pages are of dmlbench {version}, as it was released."
        return f"# Versions\n\n{text} [The newest, and all others]({site}versions.html).\n"
    text = f"These pages are of the code as it stands in the repository, which follows or becomes version {version}."
    rows = "".join(f"- [{tag}]({site}{tag}/index.html)\n" for tag in sorted(releases, key=Version, reverse=True))
    return f"# Versions\n\n{text} Every release keeps the pages that it came with.\n\n{rows}"
