// Shows the OpenAPI document of this server.
SwaggerUIBundle({
  url: `${document.body.dataset.prefix}/openapi.json`,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // no request to another host
});
