// Style and markup of the element, in a module so that the markup never shows without its style.

export const STYLE = /* css */ `
:host {
  --ink: #f4f4f2;
  --panel: rgb(24 25 28 / 72%);
  --gap: max(12px, env(safe-area-inset-left), env(safe-area-inset-right));
  display: block;
  position: relative;
  overflow: hidden;
  container-type: inline-size;
  min-height: 120px;
  background: var(--backdrop, transparent);
  color-scheme: light dark;
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}

* {
  box-sizing: border-box;
}

/* An element's own display would win over the browser's rule. */
[hidden] {
  display: none !important;
}

#stage,
canvas {
  position: absolute;
  inset: 0;
  width: 100%;
  height: 100%;
}

#poster {
  position: absolute;
  left: 50%;
  top: 50%;
  height: 100%;
  translate: -50% -50%;
}

#stage {
  cursor: grab;
  outline: none;
  touch-action: none;
  user-select: none;
  -webkit-user-select: none;
  -webkit-touch-callout: none;
}

#stage:active {
  cursor: grabbing;
}

#stage:focus-visible {
  box-shadow: inset 0 0 0 3px #4c8dff;
}

#loading,
#figures,
#hint,
#toast,
#message {
  position: absolute;
  margin: 0;
  color: var(--ink);
  background: var(--panel);
  backdrop-filter: blur(10px);
  -webkit-backdrop-filter: blur(10px);
  border-radius: 10px;
}

#loading {
  left: 50%;
  bottom: calc(28px + env(safe-area-inset-bottom));
  translate: -50% 0;
  width: min(320px, calc(100cqw - 48px));
  padding: 10px 16px 12px;
  display: grid;
  gap: 8px;
}

#loading-text {
  white-space: nowrap;
  overflow: hidden;
  text-overflow: ellipsis;
}

#progress {
  appearance: none;
  -webkit-appearance: none;
  width: 100%;
  height: 4px;
  border: 0;
  border-radius: 2px;
  overflow: hidden;
  background: rgb(255 255 255 / 24%);
}

#progress::-webkit-progress-bar {
  background: transparent;
}

#progress::-webkit-progress-value {
  background: var(--ink);
  border-radius: 2px;
  transition: width 0.15s;
}

#progress::-moz-progress-bar {
  background: var(--ink);
}

#toast {
  left: 50%;
  bottom: calc(72px + env(safe-area-inset-bottom));
  translate: -50% 0;
  padding: 7px 14px;
  white-space: nowrap;
}

#figures {
  left: calc(var(--gap) + env(safe-area-inset-left));
  bottom: calc(12px + env(safe-area-inset-bottom));
  padding: 5px 11px;
  font-size: 13px;
  font-variant-numeric: tabular-nums;
  /* Clear of the buttons. */
  max-width: calc(100cqw - 2 * var(--gap) - 224px);
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
  pointer-events: none;
}

#hint {
  left: 50%;
  top: calc(16px + env(safe-area-inset-top));
  translate: -50% 0;
  width: max-content;
  max-width: calc(100cqw - 24px);
  padding: 7px 14px;
  text-align: center;
  text-wrap: balance;
  pointer-events: none;
  transition: opacity 0.6s;
}

#hint .touch {
  display: none;
}

@media (pointer: coarse) {
  #hint .mouse {
    display: none;
  }

  #hint .touch {
    display: inline;
  }
}

#hint.seen {
  opacity: 0;
}

#buttons {
  position: absolute;
  right: calc(var(--gap) + env(safe-area-inset-right));
  bottom: calc(12px + env(safe-area-inset-bottom));
  display: flex;
  gap: 8px;
}

#buttons button {
  width: 44px;
  height: 44px;
  padding: 11px;
  border: 0;
  border-radius: 12px;
  color: var(--ink);
  background: var(--panel);
  backdrop-filter: blur(10px);
  -webkit-backdrop-filter: blur(10px);
  cursor: pointer;
}

#buttons button:hover {
  background: rgb(24 25 28 / 90%);
}

#buttons button:focus-visible,
dialog button:focus-visible {
  outline: 3px solid #4c8dff;
  outline-offset: 2px;
}

svg {
  display: block;
  fill: none;
  stroke: currentcolor;
  stroke-width: 1.8;
  stroke-linecap: round;
  stroke-linejoin: round;
}

#message {
  left: 50%;
  top: 50%;
  translate: -50% -50%;
  width: max-content;
  max-width: min(480px, calc(100cqw - 32px));
  padding: 18px 22px;
  background: rgb(24 25 28 / 90%);
}

dialog {
  width: min(400px, calc(100cqw - 32px));
  max-height: calc(100vh - 32px);
  padding: 20px 24px;
  border: 0;
  border-radius: 16px;
  color: var(--ink);
  background: #1d1e22;
}

dialog::backdrop {
  background: rgb(0 0 0 / 45%);
}

dialog h1 {
  margin: 0 0 12px;
  font-size: 18px;
}

dl {
  display: grid;
  grid-template-columns: auto 1fr;
  gap: 7px 18px;
  margin: 0;
}

dt {
  opacity: 0.65;
}

dd {
  margin: 0;
}

kbd {
  padding: 1px 6px;
  border-radius: 5px;
  background: rgb(255 255 255 / 16%);
  font: inherit;
  font-size: 13px;
}

#about {
  margin: 16px 0;
  font-size: 13px;
  opacity: 0.65;
}

dialog button {
  padding: 8px 18px;
  border: 0;
  border-radius: 9px;
  color: #1d1e22;
  background: var(--ink);
  font: inherit;
  cursor: pointer;
}

@container (max-width: 520px) {
  #details {
    display: none;
  }
}

/* A phone held sideways has little height to give away. */
@media (max-height: 480px) {
  #hint {
    top: calc(8px + env(safe-area-inset-top));
    font-size: 13px;
  }

  #loading {
    bottom: calc(12px + env(safe-area-inset-bottom));
  }

  dl {
    gap: 3px 18px;
  }
}

@media (prefers-reduced-motion: reduce) {
  * {
    transition: none !important;
  }
}
`;

export const MARKUP = /* html */ `
<div id="stage" tabindex="0" role="application" aria-busy="true" aria-label="A scene">
  <img id="poster" alt="" />
</div>
<div id="loading" role="status">
  <span id="loading-text">Loading …</span>
  <progress id="progress" max="1" value="0" aria-label="Loading"></progress>
</div>
<p id="hint" hidden>
  <span class="mouse">Drag to rotate · scroll to zoom · double-click to focus</span>
  <span class="touch">Drag to rotate · pinch to zoom · double-tap to focus</span>
</p>
<p id="figures" hidden><span id="speed"></span><span id="details"></span></p>
<p id="toast" role="status" hidden></p>
<nav id="buttons" aria-label="Scene" hidden>
  <button id="share" type="button" title="Link to this view (L)" aria-label="Link to this view">
    <svg viewBox="0 0 24 24"><path d="M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1" /></svg>
  </button>
  <button id="reset" type="button" title="Reset view (R)" aria-label="Reset view">
    <svg viewBox="0 0 24 24"><path d="M5 12a7 7 0 1 0 2.2-5.1M7 3v4.2h4.2" /></svg>
  </button>
  <button id="help" type="button" title="Controls (H)" aria-label="Controls">
    <svg viewBox="0 0 24 24"><path d="M9 9.2a3 3 0 1 1 4.4 2.6c-.9.5-1.4 1-1.4 2M12 17.4v.2" /></svg>
  </button>
  <button id="fullscreen" type="button" title="Full screen (F)" aria-label="Full screen">
    <svg viewBox="0 0 24 24"><path d="M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5" /></svg>
  </button>
</nav>
<dialog id="keys">
  <h1>Controls</h1>
  <dl>
    <dt>Rotate</dt>
    <dd>drag · arrow keys</dd>
    <dt>Zoom</dt>
    <dd>scroll · pinch · <kbd>+</kbd> <kbd>−</kbd></dd>
    <dt>Pan</dt>
    <dd>right button · two fingers · <kbd>W</kbd> <kbd>A</kbd> <kbd>S</kbd> <kbd>D</kbd></dd>
    <dt>Focus on a point</dt>
    <dd>double-click · double-tap</dd>
    <dt>Reset view</dt>
    <dd><kbd>R</kbd></dd>
    <dt>Full screen</dt>
    <dd><kbd>F</kbd></dd>
    <dt>Link to this view</dt>
    <dd><kbd>L</kbd></dd>
  </dl>
  <p id="about"></p>
  <form method="dialog"><button>Close</button></form>
</dialog>
<p id="message" role="alert" hidden></p>
`;
