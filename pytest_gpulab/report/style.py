"""The look of what pytest-gpulab adds to a pytest-html report."""

from __future__ import annotations

CSS = """
/* the decision board comes first, the environment last */
body:has(.gpulab-board) { display: flex; flex-direction: column; }
body:has(.gpulab-board) > #results-table { order: 1; margin-top: 12px; }
body:has(.gpulab-board) > #environment-header, body:has(.gpulab-board) > #environment { order: 2; }
body:has(.gpulab-board) > #environment { align-self: flex-start; }
body:has(.gpulab-board) #results-table tr.collapsible > td:not(.col-result) { color: #1f2328; }

.gpulab { color: #1f2328; font: 13px/1.45 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.gpulab p { margin: 4px 0 10px; max-width: 110ch; }
.gpulab h3 { margin: 0 0 4px; font-size: 15px; line-height: 1.35; }
.gpulab h4 { margin: 16px 0 4px; font-size: 13px; }
.gpulab small { color: #59636e; font-size: 11px; }
.gpulab code { font: 12px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.gpulab-scroll { overflow-x: auto; }
.gpulab table { border-collapse: collapse; width: 100%; color: inherit; }
.gpulab table th, .gpulab table td, #results-table .gpulab table th, #results-table .gpulab table td {
  border: 0; border-bottom: 1px solid #d9dee3; padding: 6px 14px 6px 0; text-align: left; vertical-align: top;
  font-size: 13px; overflow-wrap: break-word; }
.gpulab table th, #results-table .gpulab table th {
  color: #59636e; font-size: 11.5px; font-weight: 600; vertical-align: bottom; white-space: nowrap; }
.gpulab table .gpulab-n, #results-table .gpulab table .gpulab-n { text-align: right; white-space: nowrap; }
.gpulab-n small { display: block; }
.gpulab-tight { white-space: nowrap; }
.gpulab-board { margin: 0 0 20px; }
.gpulab-board td:nth-child(1) { width: 38%; }
.gpulab-board p { color: #59636e; }
.gpulab-experiment { padding: 10px 6px 14px; contain: inline-size; }
.gpulab-head { display: flex; gap: 8px; align-items: center; margin-bottom: 6px; flex-wrap: wrap; }

.gpulab-badge, .gpulab-basis { display: inline-block; border-radius: 4px; padding: 1px 8px; font-size: 12px;
  line-height: 18px; white-space: nowrap; pointer-events: none; }
.gpulab-badge { color: #fff; font-weight: 600; }
.gpulab-supported { background: #1a7f37; }
.gpulab-caveated { background: #8a5d00; }
.gpulab-partial { background: #0b62b8; }
.gpulab-rejected { background: #c02630; }
.gpulab-open { background: #6e40c9; }
.gpulab-blocked { background: #57606a; }
.gpulab-basis { border: 1px solid #59636e; color: #414a53; padding: 0 7px; }
.gpulab-measured { background: #e8edf2; font-weight: 600; }
.gpulab-none { color: #6b747d; pointer-events: none; }
.gpulab-outcome-held { color: #1a7f37; font-weight: 600; }
.gpulab-outcome-false { color: #c02630; font-weight: 600; }
.gpulab-outcome-undecided { color: #6e40c9; font-weight: 600; }
.gpulab-problem { border-left: 3px solid #c02630; padding-left: 8px; }
.gpulab-swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px; }
.gpulab-arm { display: block; min-width: 34ch; max-width: 60ch; }
.gpulab-plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 600px), 1fr)); gap: 14px;
  margin-top: 14px; align-items: start; }
.gpulab-plot { display: block; width: 100%; max-width: 760px; height: auto; border: 1px solid #d9dee3;
  border-radius: 6px; box-sizing: border-box; background: #fff; }
"""
