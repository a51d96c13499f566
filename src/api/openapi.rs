//! The OpenAPI 3.1 document, made from the table of routes and the types that requests and replies are made of.

use std::collections::BTreeMap;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::routes::{COMMON_ERRORS, ROUTES, ReplyKind, Route};
use crate::command::{Error, ErrorCode};

/// The document as text, as it stands in `resources/openapi.json`.
pub fn text() -> String {
    let mut text = format!("{:#}", document());
    text.push('\n');
    text
}

/// The document.
pub fn document() -> Value {
    // OpenAPI 3.1 takes JSON Schema 2020-12 as it is; only the place of shared schemas is its own.
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let error = generator.subschema_for::<Error>().to_value();
    let mut paths: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
    for route in ROUTES {
        let item = paths.entry(route.path).or_default();
        item.insert(route.method.to_ascii_lowercase(), operation(route, &mut generator));
    }
    let mut schemas = generator.take_definitions(true);
    schemas.insert(
        "Sequence".to_owned(),
        json!({
            "type": "object",
            "description": "Part of every reply.",
            "required": ["seq"],
            "properties": {"seq": {
                "type": "integer",
                "minimum": 0,
                "description": "Number of the last event before the command began: events since then show what it led to."
            }}
        }),
    );
    schemas.insert(
        "ErrorReply".to_owned(),
        json!({
            "allOf": [
                {"$ref": "#/components/schemas/Sequence"},
                {"type": "object", "required": ["error"], "properties": {"error": error}}
            ]
        }),
    );
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Aconite",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What can be asked of a running machine, on its Unix socket.",
            "license": {"name": "Apache-2.0 OR BSD-3-Clause", "identifier": "Apache-2.0 OR BSD-3-Clause"}
        },
        "servers": [{"url": "http://localhost", "description": "The Unix socket of --api-socket; the host name is ignored."}],
        "paths": paths,
        "components": {"schemas": schemas}
    })
}

fn operation(route: &Route, generator: &mut schemars::SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> = route
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            let schema = if matches!(name, "operation" | "vcpu") {
                json!({"type": "integer", "minimum": 0})
            } else {
                json!({"type": "string"})
            };
            json!({"name": name, "in": "path", "required": true, "schema": schema})
        })
        .collect();
    for parameter in route.query {
        let schema = (parameter.schema)(generator).to_value();
        let schema = if parameter.repeated { json!({"type": "array", "items": schema}) } else { schema };
        parameters.push(json!({
            "name": parameter.name,
            "in": "query",
            "required": parameter.required,
            "description": parameter.summary,
            "schema": schema
        }));
    }
    let mut responses = Map::new();
    responses.insert(route.status.to_string(), good_reply(route, generator));
    let mut errors: BTreeMap<u16, Vec<ErrorCode>> = BTreeMap::new();
    for code in route.errors.iter().chain(COMMON_ERRORS) {
        errors.entry(code.http_status()).or_default().push(*code);
    }
    for (status, codes) in errors {
        let words: Vec<String> =
            codes.iter().map(|code| json!(code).as_str().unwrap_or_default().to_owned()).collect();
        responses.insert(
            status.to_string(),
            json!({
                "description": format!("Refused: {}", words.join(", ")),
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
            }),
        );
    }
    let mut operation = json!({"operationId": route.name, "summary": route.summary, "responses": responses});
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(request) = route.request {
        operation["requestBody"] = json!({
            "required": true,
            "content": {"application/json": {"schema": request(generator).to_value()}}
        });
    }
    operation
}

fn good_reply(route: &Route, generator: &mut schemars::SchemaGenerator) -> Value {
    let (content_type, schema) = match route.reply {
        ReplyKind::Object(schema) => (
            "application/json",
            json!({"allOf": [{"$ref": "#/components/schemas/Sequence"}, schema(generator).to_value()]}),
        ),
        ReplyKind::Lines(schema) => ("application/jsonl", schema(generator).to_value()),
        ReplyKind::Document => ("application/json", json!({"type": "object"})),
    };
    json!({
        "description": if route.status == 202 { "Begun: wait for the operation" } else { "Done" },
        "headers": {"Aconite-Sequence": {
            "description": "The same number as `seq`.",
            "schema": {"type": "integer", "minimum": 0}
        }},
        "content": {content_type: {"schema": schema}}
    })
}

#[cfg(test)]
#[path = "openapi_test.rs"]
mod tests;
