// Draws the charts; on a narrow screen their panels stand below each other.
const narrow = window.innerWidth < 850;
const theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
for (const node of document.querySelectorAll("[data-chart]")) {
  const spec = JSON.parse(document.getElementById(node.dataset.chart).textContent);
  spec.background = "transparent";
  if (narrow && spec.hconcat) {
    spec.vconcat = spec.hconcat;
    delete spec.hconcat;
    for (const panel of spec.vconcat) panel.width = window.innerWidth - 130;
    spec.config.legend.columns = 2;
  }
  vegaEmbed(node, spec, { actions: false, renderer: "svg", tooltip: { theme } }).catch(console.error);
}
