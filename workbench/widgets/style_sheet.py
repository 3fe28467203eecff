"""Style of the live views: colours and type come from JupyterLab's theme."""

CSS = """
.wb-view { container-type: inline-size; color: var(--jp-ui-font-color1, inherit); padding: 4px 12px 8px 4px;
  font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif); }
.wb-view [hidden] { display: none !important; }
.wb-head { display: flex; justify-content: space-between; align-items: flex-start; gap: 16px; }
.wb-title { font-size: 16px; font-weight: 600; overflow-wrap: anywhere; }
.wb-state, .wb-note { color: var(--jp-ui-font-color2, #666); min-height: 1.45em; overflow-wrap: anywhere; }
.wb-state { font-variant-numeric: tabular-nums; }
.wb-tools, .wb-controls { display: flex; flex-wrap: wrap; gap: 8px 10px; align-items: center; }
.wb-tools { flex: none; flex-wrap: nowrap; }
.wb-controls { margin: 8px 0 2px; }
.wb-field, .wb-action { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 8px; }
.wb-field label { color: var(--jp-ui-font-color2, #666); }
.wb-field input[type="text"], .wb-field select, .wb-button, .wb-menu summary { box-sizing: border-box; height: 28px;
  padding: 0 10px; border: 1px solid var(--jp-border-color1, #bdbdbd); border-radius: 4px; color: inherit;
  background: var(--jp-layout-color1, #fff); font: inherit; }
.wb-field input[type="text"] { width: 84px; }
.wb-field input::placeholder { color: var(--jp-ui-font-color2, #666); opacity: 1; }
.wb-button, .wb-menu summary { cursor: pointer; line-height: 26px; }
.wb-button:hover, .wb-menu summary:hover { background: var(--jp-layout-color2, #eee); }
.wb-button[aria-pressed="true"] { background: var(--jp-layout-color3, #ddd); }
.wb-button[aria-disabled="true"] { color: var(--jp-ui-font-color3, #9e9e9e); cursor: default;
  background: transparent; }
.wb-view :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 2px; }
.wb-slider { flex: 1 1 260px; max-width: 520px; flex-wrap: nowrap; }
.wb-slider label { white-space: nowrap; }
.wb-slider input { flex: 1; min-width: 100px; accent-color: var(--jp-brand-color1, #1976d2); }
.wb-slider output { min-width: 104px; font-variant-numeric: tabular-nums; }
.wb-menu { position: relative; }
.wb-menu summary { list-style: none; white-space: nowrap; }
.wb-menu summary::after { content: " ▾"; }
.wb-menu > div { position: absolute; right: 0; z-index: 5; display: grid; min-width: 150px; margin-top: 4px;
  padding: 4px;
  border: 1px solid var(--jp-border-color1, #bdbdbd); border-radius: 4px; background: var(--jp-layout-color1, #fff);
  box-shadow: var(--jp-elevation-z4, 0 2px 6px #0003); }
.wb-menu .wb-button { border: 0; text-align: left; }
.wb-panels { display: grid; grid-template-columns: repeat(12, minmax(0, 1fr)); gap: 18px 32px; margin-top: 8px; }
.wb-panel { grid-column: span var(--span, 12); min-width: 0; }
@container (max-width: 760px) { .wb-panel { grid-column: span 12; } }
.wb-panel-title { font-weight: 600; margin-bottom: 2px; }
.wb-body { position: relative; }
.wb-body canvas { display: block; }
.wb-tip { position: absolute; z-index: 4; pointer-events: none; padding: 5px 9px; border-radius: 4px; font-size: 12px;
  white-space: nowrap; background: var(--jp-layout-color1, #fff); border: 1px solid var(--jp-border-color1, #bdbdbd);
  box-shadow: var(--jp-elevation-z2, 0 1px 3px #0003); font-variant-numeric: tabular-nums; }
.wb-tip div:first-child { font-weight: 600; }
.wb-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.wb-view table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0; }
.wb-view th, .wb-view td { text-align: left; padding: 5px 18px 5px 0; border: 0; font-weight: normal;
  border-bottom: 1px solid var(--jp-border-color2, #e0e0e0); background: none; }
.wb-view th { color: var(--jp-ui-font-color2, #666); }
.wb-data { margin-top: 14px; display: grid; gap: 12px; }
.wb-scroll { max-height: 260px; overflow: auto; }
.wb-scroll caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
"""
