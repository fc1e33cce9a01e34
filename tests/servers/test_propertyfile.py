"""Java's properties format: what comes out is what Java would have read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_handler.servers.torchserve.propertyfile import dump, parse


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a=b", {"a": "b"}),
        ("a:b", {"a": "b"}),
        ("a b", {"a": "b"}),
        ("a\t b", {"a": "b"}),
        ("a \t= b ", {"a": "b "}),
        ("a==b", {"a": "=b"}),
        ("a : = b", {"a": "= b"}),
        ("a", {"a": ""}),
        ("=b", {"": "b"}),
        ("  # x=y\n!z=1\n\n \t\na=#b!", {"a": "#b!"}),
        ("a=1\\\n   2\\\r\n#3\nb=4", {"a": "12#3", "b": "4"}),
        ("a=1\\\\\nb=2", {"a": "1\\", "b": "2"}),
        ("a=1\\", {"a": "1"}),
        ("# no continuation \\\na=1", {"a": "1"}),
        ("a=1\\\n\nb=2", {"a": "1", "b": "2"}),
        (r"http\://x\=y\ z=http\://h\:80", {"http://x=y z": "http://h:80"}),
        (r"a=\t\n\r\f\q\\\"", {"a": '\t\n\r\fq\\"'}),
        (r"a=\u00e9\ud83d\ude00", {"a": "\u00e9\U0001f600"}),
        ("a=1\ra=2", {"a": "2"}),
        ("a=x\u2028y\x0bz\x85", {"a": "x\u2028y\x0bz\x85"}),
    ],
)
def test_lines(text: str, found: dict[str, str]) -> None:
    assert parse(text) == found


@pytest.mark.parametrize("text", [r"a=\u12", r"a=C:\users", r"\u=1"])
def test_a_cut_escape_is_an_error_as_in_java(text: str) -> None:
    with pytest.raises(ValueError, match="four hexadecimal digits"):
        parse(text)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.dictionaries(WORDS, WORDS, max_size=5))
def test_what_is_written_is_read_back(properties: dict[str, str]) -> None:
    text = dump(properties)
    assert text.isascii()
    assert parse(text) == properties
    assert parse(text.replace("\n", "\r\n")) == properties


JAVA = """
import java.io.*; import java.util.*;
public class Read {
  static String hex(String s) { StringBuilder b = new StringBuilder("x");
    for (char c : s.toCharArray()) b.append(String.format("%04x", (int) c)); return b.toString(); }
  public static void main(String[] a) throws Exception {
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
    for (String path; (path = in.readLine()) != null;) {
      Properties p = new Properties(); StringBuilder out = new StringBuilder();
      try (InputStream s = new FileInputStream(path)) { p.load(s);
        for (String k : new TreeSet<>(p.stringPropertyNames()))
          out.append(hex(k)).append(" ").append(hex(p.getProperty(k))).append(" ");
      } catch (IllegalArgumentException e) { out.append("error"); }
      System.out.println(out.toString().trim()); System.out.flush(); } } }
"""
JavaReads = Callable[[str], "dict[str, str] | None"]


@pytest.fixture(scope="module")
def java_reads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JavaReads]:
    """`java_reads(text)`: what `java.util.Properties` makes of it, None for its error."""
    if not (shutil.which("javac") and shutil.which("java")):
        pytest.skip("no javac on PATH to compare with")
    folder = tmp_path_factory.mktemp("java")
    (folder / "Read.java").write_text(JAVA)
    subprocess.run(["javac", "Read.java"], cwd=folder, check=True, timeout=120)
    process = subprocess.Popen(
        ["java", "-cp", str(folder), "Read"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    asked, answered = process.stdin, process.stdout
    assert asked is not None
    assert answered is not None

    def word(code: str) -> str:
        return bytes.fromhex(code[1:]).decode("utf-16-be", "replace")

    def read(text: str) -> dict[str, str] | None:
        path: Path = folder / "file.properties"
        path.write_bytes(text.encode("latin-1"))
        asked.write(f"{path}\n")
        asked.flush()
        words = answered.readline().split()
        if words == ["error"]:
            return None
        return {word(k): word(v) for k, v in zip(words[::2], words[1::2], strict=True)}

    yield read
    asked.close()
    process.wait(30)
    answered.close()


PIECES = st.sampled_from(
    [
        *"abtn \t\f=:#!\\\n\r\xe9\x85\x0b", "\\\n", "\r\n", "\\u00e9", "\\u", "0041",
        "\\ud83d\\ude00", "\\ ",
    ]
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.lists(PIECES, max_size=14).map("".join))
def test_java_reads_the_same(java_reads: JavaReads, text: str) -> None:
    found: dict[str, str] | None
    try:
        found = parse(text)
    except ValueError:
        found = None
    assert found == java_reads(text)


@settings(max_examples=100, deadline=None)
@given(properties=st.dictionaries(WORDS, WORDS, max_size=5))
def test_java_reads_what_is_written(java_reads: JavaReads, properties: dict[str, str]) -> None:
    assert java_reads(dump(properties)) == properties
