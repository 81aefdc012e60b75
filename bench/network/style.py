"""How the report looks: on a phone and on a desktop, light and dark, printed."""

CSS = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --page: #fcfcfd; --card: #ffffff; --line: #e0e1e6;
  --grid: #d9d9e0; --mark: #3e63dd; --shade: #f5f6fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #b0b4ba; --page: #111113; --card: #18191b;
  --line: #2e3135; --grid: #363a3f; --mark: #9eb1ff; --shade: #202226; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.25rem 0; }
.soft { color: var(--soft); font-size: 0.875rem; }
code { font-size: 0.875em; background: var(--shade); padding: 0.1em 0.35em; border-radius: 4px; overflow-wrap: anywhere; }
.notice { border-left: 4px solid #e5484d; background: var(--shade); padding: 0.5rem 0.75rem; margin: 1rem 0; }
ul.findings { margin: 0.5rem 0; padding-left: 1.1rem; }
ul.findings li { margin: 0.3rem 0; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; padding: 0.9rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figure svg { display: block; width: 100%; height: auto; margin-top: 0.5rem; max-height: 80vh; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; padding: 0.9rem 0 0; }
.card > h3, .card > p { padding: 0 0.9rem; }
/* What is cut off on the right casts a shadow until one has scrolled there. */
.scroll { overflow-x: auto; margin-top: 0.6rem; border-radius: 0 0 10px 10px;
  background: linear-gradient(to left, var(--card) 30%, transparent) right / 40px 100% no-repeat local,
    radial-gradient(farthest-side at 100% 50%, rgb(0 0 0 / 0.28), transparent) right / 12px 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; }
tbody th { text-align: left; font-weight: 500; position: sticky; left: 0; background: var(--card); }
thead th:first-child { position: sticky; left: 0; background: var(--card); }
tr.baseline th, tr.baseline td { color: var(--soft); font-style: italic; }
table.facts th { width: 1%; vertical-align: top; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 480px) { main { padding: 0.75rem 0.75rem 3rem; } h1 { font-size: 1.35rem; }
  figure { padding: 0.6rem; } th, td { padding: 0.4rem 0.6rem; } .card > h3, .card > p { padding: 0 0.6rem; } }
@media print { figure, .card { break-inside: avoid; } .scroll { overflow: visible; } }
"""
