"""A static page with every capture of a fleet. It needs no server and loads only files beside it."""

from __future__ import annotations

import time
from html import escape
from urllib.parse import quote

from r2l_nerfstudio.fleet.plan import CaptureState, FleetState, StageState
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.fleet.table import totals

PAGE = "index.html"
RELOAD_SECONDS = 30


def write_gallery(storage: Storage, state: FleetState, is_running: bool) -> None:
    """Write `index.html` in a fleet's output.

    Args:
        storage: the output.
        state: the fleet.
        is_running: whether the page reloads itself.
    """
    thumbnails = set(storage.names("thumbnails"))
    storage.write(PAGE, gallery_html(state, thumbnails, is_running).encode())


def gallery_html(state: FleetState, thumbnails: set[str], is_running: bool) -> str:
    """Return the page.

    Args:
        state: the fleet.
        thumbnails: names of the files in the folder thumbnails/.
        is_running: whether the page reloads itself.
    """
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if is_running else ""
    cards = "\n".join(_card(capture, thumbnails) for capture in state.captures)
    now = time.strftime("%Y-%m-%d %H:%M")
    status = f"{escape(totals(state))} {'Running; this page reloads itself. ' if is_running else ''}Written {now}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{reload}
<title>Fleet: {len(state.captures)} captures</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{len(state.captures)} captures</h1>
<p>{status}</p>
<p><label>Filter <input id="filter" type="search" placeholder="name or status"></label></p>
</header>
<main>
{cards}
</main>
<footer>PSNR against held-out photos where a report exists. Interactive pages need a web server:
<code>python -m http.server --bind 127.0.0.1</code> in this folder.</footer>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _card(capture: CaptureState, thumbnails: set[str]) -> str:
    picture = f"{capture.name}.jpg"
    image = (
        f'<img loading="lazy" src="thumbnails/{quote(picture)}" alt="A photo of {escape(capture.name)}">'
        if picture in thumbnails
        else '<div class="none">no photo yet</div>'
    )
    status = _status(capture)
    rows = "".join(_student_row(capture, student) for student in capture.stages if student.kind == "student")
    teacher = capture.figure("teacher_psnr")
    head = f"<p>Teacher {teacher:.2f} dB</p>" if teacher is not None else ""
    table = f"<table><tr><th>student</th><th>PSNR</th><th>size</th><th></th></tr>{rows}</table>" if rows else ""
    problems = [capture.error] if capture.error else []
    problems += [
        f"{stage.id}: {stage.details.get('reason', '')}." for stage in capture.stages if stage.status == "failed"
    ]
    failed = "".join(f'<p class="problem">{escape(problem)}</p>' for problem in problems)
    logs = "".join(
        f' <a href="{quote(stage.details["log"])}">{escape(stage.id)} log</a>'
        for stage in capture.stages
        if stage.status == "failed" and stage.details.get("log")
    )
    return f"""<article data-text="{escape(capture.name.lower())} {status}">
{image}
<div><h2>{escape(capture.name)} <span class="{status}">{status}</span></h2>
{head}{table}{failed}{f"<p>{logs}</p>" if logs else ""}</div>
</article>"""


def _student_row(capture: CaptureState, student: StageState) -> str:
    followers = [stage for stage in capture.stages if student.id in stage.depends]
    figures = {
        name: value for stage in (student, *followers) for name, value in stage.details.get("figures", {}).items()
    }
    psnr = figures.get("student_psnr")
    quality = "" if psnr is None else f"{psnr:.2f} dB"
    if psnr is None:
        against = figures.get("psnr_against_teacher", student.details.get("psnr"))
        quality = "" if against is None else f"{against:.2f} dB against teacher"
    links, sizes = [], []
    for stage in followers:
        if stage.status != "done":
            continue
        name = stage.id.removeprefix(f"{student.id}-")
        place = "/".join(filter(None, (stage.details["result"], stage.details["page"])))
        links.append(f'<a href="{quote(place)}">{escape(name)}</a>')
        if stage.kind != "report":
            sizes.append(f"{escape(name)} {_size(stage.details['bytes'])}")
    if not sizes and student.status == "done":
        sizes = [f"run {_size(student.details['bytes'])}"]
    cells = (escape(student.id), quality or student.status, "<br>".join(sizes), " ".join(links))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _status(capture: CaptureState) -> str:
    statuses = {stage.status for stage in capture.stages}
    if capture.error or "failed" in statuses:
        return "failed"
    if "running" in statuses:
        return "running"
    return "done" if statuses == {"done"} else "waiting"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; padding: 1.5rem; max-width: 90rem; margin-inline: auto; }
h1 { margin: 0; font-size: 1.5rem; }
header p { margin: .3rem 0; }
input { font: inherit; padding: .25rem .5rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; margin: 1rem 0; }
article { border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
article > div { padding: .5rem .9rem .8rem; }
article img, .none { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: cover; background: #8882; }
article .none { display: grid; place-items: center; padding: 0; color: gray; }
h2 { font-size: 1.05rem; margin: .2rem 0; overflow-wrap: anywhere; }
h2 span { font-size: .75rem; font-weight: normal; padding: .1rem .45rem; border-radius: 1rem; background: #8883; }
h2 .done { background: #2a72; } h2 .failed { background: #c334; } h2 .running { background: #27c4; }
p { margin: .25rem 0; }
.problem { color: #b33; overflow-wrap: anywhere; max-height: 6rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: normal; color: gray; }
td, th { padding: .15rem .5rem .15rem 0; vertical-align: top; border-top: 1px solid var(--line); }
footer { color: gray; }
[hidden] { display: none; }
"""
_SCRIPT = """
const filter = document.getElementById("filter");
const apply = () => {
  for (const card of document.querySelectorAll("article"))
    card.hidden = !card.dataset.text.includes(filter.value.toLowerCase());
  history.replaceState(null, "", filter.value ? "#" + encodeURIComponent(filter.value) : location.pathname);
};
filter.value = decodeURIComponent(location.hash.slice(1));
filter.addEventListener("input", apply);
if (filter.value) apply();
"""
