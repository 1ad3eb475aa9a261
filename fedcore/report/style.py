"""The report's style sheet: light and dark, wide and narrow, screen and print."""

CSS = """
:root { color-scheme: light dark;
  --bg: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5c6570; --line: #e3e6ea; --track: #edeff2;
  --warn: #9a5b00; --warn-bg: #fff3dc; --good: #0b6b46; --good-bg: #dff5ea; --bad: #a01f1f;
  --bad-bg: #fde5e4;
  --c1: #2a6fd6; --c2: #dd5f2a; --c3: #159c6c; --c4: #8457cf; --c5: #c93f78; --c6: #b88700; --c7: #1b93a8;
  --c8: #747d88;
  --heat: 42 111 214; --fall: 221 95 42; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #121417; --card: #1b1e23; --ink: #e9ecef; --soft: #9aa3ad; --line: #2d3239; --track: #282c33;
  --warn: #f3c15f; --warn-bg: #3a2e12; --good: #6fdcab; --good-bg: #12352a; --bad: #ff9c97;
  --bad-bg: #42201f;
  --c1: #6ba3f5; --c2: #f58a5c; --c3: #3fc994; --c4: #b08df0; --c5: #ee7fab; --c6: #e0b341; --c7: #52c4d8;
  --c8: #a3abb5;
  --heat: 107 163 245; --fall: 245 138 92; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 16px; margin: 0 0 12px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); } small { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  min-width: 0; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  margin-top: 16px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; color: var(--soft); margin-top: 6px; }
.facts b { color: var(--ink); font-weight: 550; }
.chip { display: inline-block; border-radius: 99px; padding: 2px 11px; font-size: 13px; font-weight: 650;
  vertical-align: 4px; margin-left: 10px; }
.chip.good { color: var(--good); background: var(--good-bg); } .chip.warn { color: var(--warn);
  background: var(--warn-bg); }
.chip.bad { color: var(--bad); background: var(--bad-bg); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .mark { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 3 3; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .hit { fill: transparent; } svg .hit:hover { fill: rgb(128 128 128 / .25); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 8px; font-size: 13px;
  color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content max-content; gap: 9px 12px;
  align-items: center; }
.bar { display: contents; } .bar .name { max-width: 190px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.bar .track { background: var(--track); border-radius: 5px; height: 14px; overflow: hidden; }
.bar .fill { display: block; height: 100%; border-radius: 5px; }
.bar .value { text-align: right; font-variant-numeric: tabular-nums; font-weight: 550; }
.bar .note { color: var(--soft); font-size: 13px; white-space: nowrap; }
.scroll { overflow-x: auto; max-height: 640px; overflow-y: auto; }
.scroll.tall { max-height: none; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 550; text-align: right; padding: 5px 6px;
  border-bottom: 1px solid var(--line);
  position: sticky; top: 0; background: var(--card); white-space: nowrap; }
td { text-align: right; padding: 5px 6px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.heat { text-align: center; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 2px; } td.left, th.left { text-align: left;
  white-space: normal; }
td.left:last-child { min-width: 160px; }
tr:last-child td { border-bottom: 0; } tr.missed td { background: var(--warn-bg); }
  tr.missed td.left { color: var(--warn); }
td.heat { border: 2px solid var(--card); border-radius: 6px; text-align: center; min-width: 44px; }
.card.wide { grid-column: 1 / -1; }
.split { display: grid; gap: 8px 28px; align-items: center;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
tr.start td { color: var(--soft); } td.heat small { margin-left: 4px; }
table.timeline { width: auto; } .timeline td, .timeline th { text-align: center; padding: 5px 10px; }
.timeline td.left, .timeline th.left { text-align: left; padding-left: 2px; }
.timeline img { display: block; margin: 0 auto; width: 56px; height: 56px; object-fit: contain;
  image-rendering: pixelated; border-radius: 5px; background: var(--track); }
.classes { display: grid; gap: 0 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
.class { padding: 9px 0; border-top: 1px solid var(--line); }
.class .label { font-weight: 550; margin-bottom: 6px; } .class small { font-weight: 400; margin-left: 8px; }
.pics { display: flex; flex-wrap: wrap; gap: 5px; }
.pics img { width: 52px; height: 52px; object-fit: contain; image-rendering: pixelated; border-radius: 5px;
  background: var(--track); }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--track); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 0 0 12px; }
footer { color: var(--soft); font-size: 13px; margin-top: 26px; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .bar .note { display: none; }
  .bars { grid-template-columns: max-content 1fr max-content; } }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } .scroll { max-height: none;
  } }
""" + "".join(
    f"svg .s{n} {{ stroke: var(--c{n}); }} svg .f{n} {{ fill: var(--c{n}); }} "
    f".b{n} {{ background: var(--c{n}); }}\n"
    for n in range(1, 9)
)
