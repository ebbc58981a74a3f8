"""The report's CSS, with light and dark mode by the system's preference."""

from __future__ import annotations

__all__ = ["STYLESHEET"]

LIGHT_COLOURS = ("#2a6fdb", "#d9622b", "#12946a", "#b07d00", "#7a4fd0", "#c8407c", "#5d6f80", "#6f8f1e")
DARK_COLOURS = ("#6ea8ff", "#ff9561", "#3fcf9f", "#e8b93a", "#b394ff", "#ff84b4", "#9fb0c0", "#b3d356")


def _format_colour_variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{place}:{colour};" for place, colour in enumerate(colours))


COLOUR_CLASSES = "".join(
    f".s{place}{{stroke:var(--c{place})}}.f{place}{{fill:var(--c{place})}}.k{place}{{background:var(--c{place})}}"
    for place in range(len(LIGHT_COLOURS))
)
STYLESHEET = f"""
:root{{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#17202b;--soft:#5b6776;--rule:#e3e7ec;--hover:#17202b12;
{_format_colour_variables(LIGHT_COLOURS)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#11151a;--card:#191f26;--ink:#e8edf2;--soft:#9aa7b5;--rule:#2c353f;
--hover:#ffffff14;{_format_colour_variables(DARK_COLOURS)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}}
main{{max-width:1240px;margin:0 auto;padding:32px 20px 64px}}
header{{margin-bottom:20px}}
h1{{font-size:26px;line-height:1.25;margin:0;overflow-wrap:anywhere}}
h2{{font-size:16px;margin:0 0 8px}}
header p{{margin:4px 0 0;color:var(--soft)}}
section,figure,details,.tiles div{{background:var(--card);border:1px solid var(--rule);border-radius:10px}}
section{{padding:16px 18px;margin:0 0 16px}}
.tiles{{display:flex;flex-wrap:wrap;gap:10px;margin:0 0 16px}}
.tiles div{{padding:10px 16px;min-width:120px}}
dt{{font-size:12px;color:var(--soft)}}
dd{{margin:0;font-size:20px;font-variant-numeric:tabular-nums}}
.verdict p{{margin:0}}
.verdict ul{{margin:8px 0 0;padding-left:20px;color:var(--soft)}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;margin:0 0 16px}}
figure{{margin:0;padding:14px 14px 8px;display:flex;flex-direction:column}}
figure svg{{margin-top:auto}}
figcaption{{font-weight:600;padding-left:4px}}
svg{{display:block;width:100%;height:auto}}
.tick{{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}}
.end{{text-anchor:end}}.mid{{text-anchor:middle}}
.grid{{stroke:var(--rule)}}.axis{{stroke:var(--soft)}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round}}
.band{{opacity:.18}}
.layer{{stroke:var(--card);stroke-width:.7}}
.strip{{fill:transparent}}.strip:hover{{fill:var(--hover)}}
.mark line{{stroke:var(--soft);stroke-dasharray:4 3}}.mark path{{fill:var(--soft)}}
.resize line{{stroke:var(--c1)}}.resize path{{fill:var(--c1)}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 4px;padding:0 4px;font-size:13px;
color:var(--soft)}}
.key{{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);white-space:nowrap}}
tr:last-child>*{{border-bottom:0}}
tr:first-child th{{color:var(--soft);font-weight:500}}
caption{{text-align:left;color:var(--soft);padding:10px 0 4px}}
.best p{{margin:0}}
.events td:last-child{{white-space:normal;overflow-wrap:anywhere}}
details{{margin:0 0 12px;padding:12px 18px}}
summary{{cursor:pointer;font-weight:600;overflow-wrap:anywhere}}
details[open] summary{{margin-bottom:14px}}
{COLOUR_CLASSES}
"""
