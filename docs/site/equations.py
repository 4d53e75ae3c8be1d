"""A hook of the site: equations as MathML, which browsers draw by themselves."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(html: str, **others: Any) -> str:
    """The page with every equation drawn."""
    html = INLINE.sub(lambda match: convert(unescape(match[1]).strip()), html)
    return DISPLAY.sub(lambda match: convert(unescape(match[1]).strip(), display="block"), html)
