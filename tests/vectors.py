"""Paths and URLs that try to lead out of what is allowed, made from the ways in which that is tried."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

INSIDE, OUTSIDE = b"inside", b"outside"
UP = (
    "..",
    "%2e%2e",
    "%252e%252e",
    "..%2f..",
    "..\\..",
    "..%5c",
    "..;",
    "....",
    ".. ",
    "..\u200b",
    "\u2025",
    "\uff0e\uff0e",
    "..\u2215",
    "..\uff0f",
    "%c0%ae%c0%ae",
    "..\x00",
    "..\n",
    "..\x1b[2J",
    "..\udcff",
    ".\u202e.",
)
BEFORE = ("", "./", "sub/", "sub/../", "sub/./../", "a.jpg/", "nothing/", "link-in/")


def tree(folder: Path) -> Path:
    """Makes a folder that may be read, among others that may not; returns the one that may."""
    root = folder / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "sub/deep/c.jpg"):
        (root / name).write_bytes(INSIDE)
    for name in ("root-sibling", "elsewhere"):
        (folder / name).mkdir()
        (folder / name / "secret.jpg").write_bytes(OUTSIDE)
    (folder / "secret.jpg").write_bytes(OUTSIDE)
    links = {
        "link-in": "sub",
        "link-out": str(folder / "elsewhere"),
        "link-up": "..",
        "link-root": "/",
        "link-file": "../secret.jpg",
        "link-absolute": str(folder / "secret.jpg"),
        "link-proc": "/proc/self/root",
        "link-cwd": "/proc/self/cwd",
        "link-zero": "/dev/zero",
        "link-stdin": "/dev/stdin",
        "link-none": "nothing",
        "sub/link-up-twice": "../..",
        "sub/link-through": "../link-out/secret.jpg",
        "circle": "circle",
        "chain-0": "../secret.jpg",
        **{f"chain-{k}": f"chain-{k - 1}" for k in range(1, 30)},
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    (root / "link-pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    return root


def paths(root: Path) -> list[str]:
    """Returns names that lead out of a `tree`, or would if somebody decoded, expanded or followed what is in them."""
    outside = root.parent
    found = [f"{before}{up}/{rest}" for before, up, rest in itertools.product(BEFORE, UP, ("secret.jpg", "etc/passwd"))]
    found += ["../" * depth + "etc/passwd" for depth in range(1, 40)]
    found += ["sub/" + "deep/../" * depth + "../../secret.jpg" for depth in range(30)]
    targets = (str(outside / "secret.jpg"), "/etc/passwd", f"{root}/../secret.jpg", f"{root}-sibling/secret.jpg")
    forms = (
        "{}",
        "/{}",
        "//{}",
        "file://{}",
        "FILE://{}",
        "file:{}",
        "file:////{}",
        "file://localhost{}",
        " {}",
        "\t{}",
    )
    forms += (
        "file://[::1]{}",
        "file://..{}",
        "url:file://{}",
        "s3://bucket{}",
        "\\\\?\\{}",
        "\\\\host\\c${}",
        "{}\x00.jpg",
    )
    found += [form.format(target) for form, target in itertools.product(forms, targets)]
    found += ["file://" + "".join(f"%{ord(char):02x}" for char in target) for target in targets]
    found += [
        f"/proc/{process}/{what}" for process in ("self", "1", "thread-self") for what in ("environ", "mem", "maps")
    ]
    found += [
        f"/proc/self/{way}{outside}/secret.jpg" for way in ("root", "cwd/../../../../..", "task/../root", "fd/../root")
    ]
    found += [f"/dev/{name}" for name in ("zero", "null", "random", "tty", "stdin", "fd/0", "shm", "full", "mem")]
    found += [
        "link-out/secret.jpg",
        "link-up/secret.jpg",
        f"link-root{outside}/secret.jpg",
        "link-file",
        "link-absolute",
    ]
    found += [
        f"link-proc{outside}/secret.jpg",
        "link-cwd/pyproject.toml",
        "link-zero",
        "link-stdin",
        "link-none",
        "circle",
    ]
    found += ["sub/link-up-twice/secret.jpg", "sub/link-through", *(f"chain-{k}" for k in range(30))]
    found += [
        "pipe",
        "link-pipe",
        "socket",
        ".",
        "",
        "sub",
        "/",
        "~",
        "~root/x",
        "$HOME/x",
        "${HOME}",
        "%HOME%",
        "*",
        "a.jp?",
    ]
    found += ["x" * 300, "x/" * 3000, "x" * 10**6, "../" * 10**4 + "etc/passwd", "\ud800", "\udfff.jpg", "\x1b]0;x\x07"]
    return found


def urls(port: int, canary: int) -> Iterator[str]:
    """Yields URLs that lead elsewhere than to `http://127.0.0.1:PORT/photos/`, or would if somebody misread them."""
    spelled = (
        "localhost",
        "LOCALHOST.",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.1.",
        "127.0.0.2",
        "0",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:1]",
        "[::127.0.0.1]",
        "[fe80::1%25lo]",
        "\u2460\u2461\u2466.0.0.1",
        "127\u30020\u30020\u30021",
        "\uff11\uff12\uff17.0.0.1",
        "loc\u00adalhost",
        "ⓛocalhost",
        "xn--localhost-",
        "127.0.0.1.nip.io",
        "169.254.169.254",
        "[fd00:ec2::254]",
        "metadata.google.internal",
        "10.0.0.1",
        "192.168.0.1",
        "host.docker.internal",
        "kubernetes.default.svc",
        "127.0.0.1%00.example.com",
        "127.0.0.1%2f@x",
        "127.0.0.1 ",
        "127.0.0.1\t",
        "",
        "a" * 64 + ".com",
        "a." * 200 + "com",
    )
    for host, target in itertools.product(spelled, (port, canary)):
        yield f"http://{host}:{target}/photos/a.jpg"
    good, bad = f"127.0.0.1:{port}", f"127.0.0.1:{canary}"
    for between in (
        "@",
        "%40",
        "\\@",
        "#@",
        "?@",
        "/@",
        ":@",
        " @",
        "\t@",
        ";@",
        "&@",
        ":80@",
        ":80#@",
        "%20@",
        "\x00@",
    ):
        yield f"http://{good}{between}{bad}/photos/a.jpg"
        yield f"http://{bad}{between}{good}/photos/a.jpg"
    for form in (
        "http:/{}",
        "http:{}",
        "http:///{}",
        "http:////{}",
        "http:\\\\{}",
        "//{}",
        "\\\\{}",
        "{}",
        "https://{}",
    ):
        yield form.format(f"{bad}/photos/a.jpg")
    for scheme in (
        "ftp",
        "file",
        "gopher",
        "dict",
        "ldap",
        "data",
        "jar:http",
        "s3",
        "gs",
        "az",
        "ws",
        "h\ttp",
        "http\n",
        " http",
    ):
        yield f"{scheme}://{bad}/photos/a.jpg"
    for number in ("0", "65536", "99999999", "-1", "+80", " 80", "8_0", "\u0661", "80:80", f"0{port}0", ""):
        yield f"http://127.0.0.1:{number}/photos/a.jpg"
    for up, end in itertools.product(UP[:12], ("/secret", "/photos/../secret")):
        yield f"http://{good}/photos/{up}{end}"
        yield f"http://{good}/{up}{end}"
    for path in (
        "/secret",
        "/photos",
        "/photosecret",
        "/PHOTOS/a",
        "//photos/a",
        "/./photos/a",
        "/%70hotos/a",
        "?/photos/a",
        "#/photos/a",
    ):
        yield f"http://{good}{path}"
    for split in ("\r\n", "\n", "\r", "\x0b", "\x85", "\u2028", "\udc0a"):
        yield f"http://{good}/photos/a.jpg{split}Host: {bad}{split}{split}GET /secret HTTP/1.1"
        yield f"http://{good}{split}/photos/a.jpg"
    yield f"http://{good}/photos/" + "a" * 10**6
    yield f"http://{good}/photos/" + "%25" * 2500
    yield from (f"http://{good}/photos/{status}" for status in (301, 302, 303, 307, 308))


PRIVATE = (
    "127.0.0.1",
    "127.9.9.9",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "0.0.0.0",
    "0.0.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "2001:db8::1",
    "2001::1",
    "100::1",
    "::127.0.0.1",
    "fec0::1",
)
"""Addresses that a name may not lead to."""
