// Loaded by /docs; a file of its own because the page's policy allows no inline scripts.
window.addEventListener("load", () => {
  window.ui = window.SwaggerUIBundle({
    url: "openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    docExpansion: "none",
    filter: true,
    persistAuthorization: true,
    syntaxHighlight: { activated: true, theme: "agate" },
    tryItOutEnabled: true,
    validatorUrl: null,
  });
});
