"""The style sheet: narrow and wide screens, light and dark, and paper."""

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f5f6f8; --text: #1b1f24;
  --soft: #57606a; --line: #d0d7de; --link: #0b57b0; --fill: #9aa5b1; --good: #1a7f4b;
  --fair: #a86400; --bad: #c0272d; --m1: #c0272d; --m2: #6f35a5; --m3: #a15c00; --m4: #0b62c4;
  --m5: #0b6e75; --m6: #1a7f37; --m7: #b0257a; --m8: #6b4f2a; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1f242c; --text: #e6e9ee;
  --soft: #a3adba; --line: #3a424d; --link: #82b7ff; --fill: #6b7684; --good: #56d492;
  --fair: #f0b04e; --bad: #ff8080; --m1: #ff8585; --m2: #cfa3ff; --m3: #ffb454; --m4: #7db8ff;
  --m5: #5fd6d9; --m6: #6fdd8b; --m7: #ff94cf; --m8: #dcc3a0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 3.5rem; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 48rem; }
a { color: var(--link); }
code, pre { font: .875em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.paste { user-select: all; }
.soft { color: var(--soft); }
.missing { background: var(--card); border-left: .25rem solid var(--fill); padding: .6rem .8rem; }
.failed { border-left: .25rem solid var(--bad); }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: .2rem 1.1rem; overflow-x: auto;
  margin: 1rem -1rem 0; padding: .55rem 1rem; background: var(--back);
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; padding: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .65rem .8rem; }
.facts dt { color: var(--soft); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
.facts small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { min-width: 8rem; }
.bar { display: flex; align-items: center; gap: .5rem; min-width: 9rem; }
.bar b { min-width: 3.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.bar i { flex: 1; height: .7rem; border-radius: .2rem; background: var(--card); }
.bar i span { display: block; height: 100%; border-radius: .2rem; background: var(--good); }
.bar .fair { background: var(--fair); } .bar .bad { background: var(--bad); }
.mark { font-weight: 600; } .mark.good { color: var(--good); } .mark.fair { color: var(--fair); }
.mark.bad { color: var(--bad); }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20.5rem, 100%), 1fr)); }
figure { margin: 0; padding: .7rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figcaption { font-size: .9rem; overflow-wrap: anywhere; }
figcaption .soft { display: block; font-size: .8rem; }
svg { display: block; width: 100%; height: auto; margin: .3rem 0; }
svg text { font: 10px ui-sans-serif, system-ui, sans-serif; fill: var(--soft); }
svg .count { fill: var(--fill); } svg .axis { stroke: var(--soft); }
svg .clip { fill: none; stroke-width: 1.4; } svg .clip.c0 { stroke-width: 2.6; }
svg .disc { stroke: var(--card); stroke-width: 1; }
svg .digit { font-weight: 700; font-size: 9px; fill: var(--card); }
.c0 { color: var(--text); } .c1 { color: var(--m1); } .c2 { color: var(--m2); }
.c3 { color: var(--m3); } .c4 { color: var(--m4); } .c5 { color: var(--m5); }
.c6 { color: var(--m6); } .c7 { color: var(--m7); } .c8 { color: var(--m8); }
.legend { list-style: none; margin: 0; padding: 0; font-size: .8rem; }
.legend li { display: grid; grid-template-columns: 1rem 6.7rem 1fr auto; gap: .25rem;
  white-space: nowrap; }
.legend b { font-weight: 700; } .legend span { font-variant-numeric: tabular-nums; }
details { margin: .5rem 0 1rem; } summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
@media (max-width: 44rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: 1fr 1fr; gap: .2rem .9rem; padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  td { display: block; border: 0; padding: 0; min-width: 0; overflow-wrap: anywhere; }
  td:first-child, td.long { grid-column: 1 / -1; }
  td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .75rem; }
  td:first-child::before { display: none; }
  td.number { white-space: normal; }
  .bar { min-width: 0; }
}
@media print { nav { display: none; } figure, tr { break-inside: avoid; } }
"""
