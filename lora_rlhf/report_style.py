"""The page around a report and its look: light and dark, phone and paper, nothing fetched."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title} | lora_rlhf</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="verdict {tone}">{verdict}</p>{header}</header>
<main>{body}</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1d2328; --soft: #5d6873;
  --rule: #dfe3e6; --c0: #0b6e99; --c1: #c2570c; --c2: #4d7c0f; --c3: #7c3aed; --good: #137a3b;
  --even: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2125; --ink: #e6e9eb;
  --soft: #9aa6b0; --rule: #333b42; --c0: #5bbbe6; --c1: #f2955a; --c2: #a3d65c; --c3: #b79bff;
  --good: #5fd38d; --even: #e6b455; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 60px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: .95rem; margin: 18px 0 8px; overflow-wrap: anywhere; }
h4 { margin: 0 0 4px; font-size: .8rem; font-weight: 600; color: var(--soft); }
p { margin: 0 0 8px; }
.verdict { font-size: 1.1rem; max-width: 52em; border-left: 4px solid; padding-left: 12px; }
.verdict.good { border-color: var(--good); } .verdict.even { border-color: var(--even); }
.verdict.bad { border-color: var(--bad); } p.bad { color: var(--bad); overflow-wrap: anywhere; }
.said { max-width: 52em; border-left: 4px solid; padding-left: 12px; overflow-wrap: anywhere; }
.said.good { border-color: var(--good); } .said.bad { border-color: var(--bad); }
.said.even { border-color: var(--even); }
.chips { list-style: none; display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0 0;
  padding: 0; }
.chips li { border: 1px solid var(--rule); border-radius: 99px; padding: 1px 10px;
  font-size: .85rem; color: var(--soft); }
.note, .unit, .range, small { color: var(--soft); font-size: .85rem; font-weight: 400; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0 0 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-size: .8rem; font-weight: 600; color: var(--soft);
  white-space: nowrap; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.results td:first-child { font-weight: 600; } .results td:nth-child(2) { white-space: nowrap; }
.results td:last-child { color: var(--soft); font-size: .85rem; }
.tax td small { display: block; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right;
  white-space: nowrap; }
.probes td:nth-child(2), .probes td:nth-child(3) { text-align: right; white-space: nowrap; }
.probes td:first-child { white-space: nowrap; }
.probes td:last-child { overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); } .facts td { overflow-wrap: anywhere; }
.looks td:first-child { white-space: nowrap; color: var(--soft); }
.looks td { white-space: pre-wrap; overflow-wrap: anywhere; }
.interval { width: 160px; height: 20px; vertical-align: middle; margin-right: 8px; }
.interval .span { stroke-width: 4; stroke-linecap: round; fill: none; }
.interval.good { color: var(--good); } .interval.even { color: var(--even); }
.interval.bad { color: var(--bad); } .interval.plain { color: var(--c0); }
.interval .span { stroke: currentColor; } .interval circle { fill: currentColor; }
.range { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 14px; margin: 0 0 14px; }
figure { margin: 0; padding: 10px 12px 6px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; break-inside: avoid; }
figcaption { font-size: .92rem; line-height: 1.35; }
figure svg { display: block; width: 100%; height: auto; margin-top: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .85rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: var(--c0); }
.key.c1 { background: var(--c1); } .key.c2 { background: var(--c2); }
.key.c3 { background: var(--c3); }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.ref { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
.tick { font-size: 11px; fill: var(--soft); }
.halo { paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.raw { fill: none; stroke-width: 1; opacity: .3; }
.area { stroke-width: 1.5; fill-opacity: .14; stroke-linejoin: round; }
.area.c0 { fill: var(--c0); } .area.c1 { fill: var(--c1); } .area.c2 { fill: var(--c2); }
.area.c3 { fill: var(--c3); }
.whisker { stroke-width: 1.5; opacity: .55; fill: none; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); } path.c2 { stroke: var(--c2); }
path.c3 { stroke: var(--c3); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle.c2 { fill: var(--c2); }
circle.c3 { fill: var(--c3); }
article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px; margin: 0 0 12px; break-inside: avoid; }
.prompt { font-style: italic; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr));
  gap: 12px 20px; }
.pair p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.pair > div { border-left: 3px solid var(--rule); padding-left: 10px; }
.pair > .after { border-color: var(--c0); }
summary { cursor: pointer; margin: 6px 0; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 640px) {
  .results thead { display: none; }
  .results tr { display: flex; flex-wrap: wrap; gap: 0 12px; padding: 7px 0;
    border-bottom: 1px solid var(--rule); }
  .results td { border: 0; padding: 0; } .results td:nth-child(2) { margin-left: auto; }
  .results td:nth-child(3) { flex-basis: 100%; } .results td:empty { display: none; }
  .numbers td small { display: block; } .numbers th, .numbers td { padding-right: 12px; }
  .numbers td:first-child { min-width: 6em; }
  .probes thead { display: none; } .probes tr { display: flex; flex-wrap: wrap; gap: 0 12px;
    padding: 7px 0; border-bottom: 1px solid var(--rule); } .probes td { border: 0; padding: 0; }
  .probes td:nth-child(2) { margin-left: auto; } .probes td:last-child { flex-basis: 100%; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc;
    --c0: #0b6e99; --c1: #c2570c; --c2: #4d7c0f; --c3: #7c3aed; --good: #137a3b; --even: #8a5a00;
    --bad: #b3261e; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  .charts { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; } .wide { overflow: visible; }
  .numbers { font-size: 8.5pt; } .numbers th, .numbers td { padding-right: 8px; }
  tr, .said { break-inside: avoid; } h3 { break-after: avoid; }
  summary { list-style: none; } details::details-content { content-visibility: visible;
    block-size: auto; }
}
"""
