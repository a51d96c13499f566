//! Tests of the OpenAPI document.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::*;

/// The checked-in document is what the types say. `UPDATE=1 cargo test openapi` writes it anew.
#[test]
fn the_checked_in_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/openapi.json");
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, text()).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == text(),
        "resources/openapi.json is out of date: run UPDATE=1 cargo test -p aconite openapi"
    );
}

/// Every `$ref` in the document, wherever it is.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("$ref").and_then(Value::as_str));
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 10, "{found:?}");
    for reference in found {
        let pointer = reference.strip_prefix('#').expect("references stay in the document");
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

#[test]
fn every_route_is_there_with_its_parameters_and_errors() {
    let document = document();
    let mut names = BTreeSet::new();
    for route in ROUTES {
        assert!(names.insert(route.name), "{} names two routes", route.name);
        let operation = &document["paths"][route.path][route.method.to_ascii_lowercase()];
        assert_eq!(operation["operationId"], route.name);
        assert!(operation["responses"][route.status.to_string()].is_object());
        for code in route.errors {
            let words = &operation["responses"][code.http_status().to_string()]["description"];
            let word = json!(code);
            assert!(words.as_str().unwrap().contains(word.as_str().unwrap()), "{}: {word}", route.name);
        }
        assert_eq!(operation.get("requestBody").is_some(), route.request.is_some());
        let in_path = route.path.matches('{').count();
        assert_eq!(
            operation["parameters"].as_array().map_or(0, Vec::len),
            in_path + route.query.len(),
            "{}",
            route.name
        );
    }
}

#[test]
fn every_error_code_is_in_the_document() {
    let document = document();
    let codes = &document["components"]["schemas"]["ErrorCode"];
    let text = codes.to_string();
    for code in ErrorCode::ALL {
        assert!(text.contains(&json!(code).to_string()), "{code:?}");
    }
}
