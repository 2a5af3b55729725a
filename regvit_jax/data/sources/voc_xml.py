"""Annotations in the XML of PASCAL VOC, one file an image, as labelImg and many other tools write them too.

    <annotation>
      <object>
        <name>dog</name> <difficult>0</difficult> <truncated>1</truncated>
        <bndbox> <xmin>48</xmin> <ymin>240</ymin> <xmax>195</xmax> <ymax>371</ymax> </bndbox>
      </object>
    </annotation>

Pixels count from 1 there and the far edges are inclusive; a box here is (xmin - 1, ymin - 1, xmax, ymax). Some
coordinates of VOC2012 have a fraction, which is cut off.
"""

import os
from xml.etree import ElementTree
from xml.parsers import expat

from regvit_jax.data.decode import DecodeError
from regvit_jax.data.sources.boxed import Object, coordinates

# Of a file; those of VOC have a few kilobytes.
MAX_BYTES = 2**24
_EDGES = ("xmin", "ymin", "xmax", "ymax")


def read(path: str, first: int = 1) -> list[Object]:
    """The objects of a file, in its order; `first` is what its coordinates call the first pixel.

    Raises:
      DecodeError: a ValueError that names the file, if it is broken, no annotation, or declares a document type:
        entities, with which a small file can expand to gigabytes or name others, come with one.
      OSError: if it cannot be read.
    """
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        with open(path, "rb") as file:
            root = _tree(file.read())
        if root.tag != "annotation":
            raise ValueError(f"it holds <{root.tag}>, expected <annotation>")
        # Parts of an object (VOC2012 has heads and hands) have names and boxes too, one level deeper.
        return [_object(node, place, first) for place, node in enumerate(root.findall("object"), start=1)]
    except (ValueError, LookupError, expat.ExpatError) as error:
        raise DecodeError(f"{path}: not a readable annotation in the XML of VOC ({error})") from error


def _tree(content):
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, _refuse
    parser.Parse(content, True)
    return builder.close()


def _refuse(name, *_):
    raise ValueError(f"it declares a document type {name!r}, with which come entities: remove the line <!DOCTYPE …>")


def _object(node, place, first):
    kind, box = (node.findtext("name") or "").strip(), node.find("bndbox")
    missing = [] if kind else ["name"]
    missing += ["bndbox"] if box is None else [edge for edge in _EDGES if not (box.findtext(edge) or "").strip()]
    if missing:
        raise ValueError(f"object {place}{f', {kind!r},' if kind else ''} has no {', no '.join(missing)}")
    try:
        xmin, ymin, xmax, ymax = (int(value) for value in coordinates([box.findtext(edge) for edge in _EDGES]))
    except ValueError as error:
        raise ValueError(f"object {place}, {kind!r}: {error}") from error
    flags = {key: (node.findtext(key) or "0").strip().lower() in ("1", "true") for key in ("difficult", "truncated")}
    return Object((xmin - first, ymin - first, xmax, ymax), kind, **flags)


def read_all(paths: list[str], first: int = 1) -> tuple[list[list[Object]], dict[int, str]]:
    """(objects of each file, {place: why a file cannot be read}); one that cannot be read has none."""
    found, bad = [], {}
    for place, path in enumerate(paths):
        try:
            found.append(read(path, first))
        except FileNotFoundError:
            found.append([])
            bad[place] = f"{path}: there is no such annotation"
        except (DecodeError, OSError) as error:
            found.append([])
            bad[place] = str(error)
    return found, bad
