"""How the page looks: plain, in the reader's light or dark, on paper too."""

CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2024; --soft: #5b636d; --line: #d9dde2; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e8eaed; --soft: #a3abb5; --line: #343a42; --card: #1d2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0; }
.headline { font-size: 1.6rem; line-height: 1.3; font-weight: 650; margin: .25rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .25rem 0; max-width: 50rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .85rem; }
.cards dt { color: var(--soft); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; font-family: inherit; stroke-linejoin: round; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
caption { text-align: left; padding-bottom: .4rem; max-width: calc(100vw - 3rem); }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
tbody th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 30%; min-width: 8rem; vertical-align: middle; }
td.bar span { display: block; height: .8rem; min-width: 1px; border-radius: .2rem; background: #2f7ed8; }
td { overflow-wrap: anywhere; }
.facts th { width: 13rem; }
.figures th, .figures td { white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.5 ui-monospace, "Liberation Mono", Menlo, monospace; }
ul.warnings { border-left: .25rem solid #d8611e; padding: .25rem 0 .25rem 1.5rem; margin: 1rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  td.bar, thead td { display: none; }
  .cards { grid-template-columns: 1fr 1fr; }
}
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
