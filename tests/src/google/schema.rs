//! What a discovery document says of a call: parameters, their patterns, and the shape of the body.

use std::collections::HashMap;

use regex::Regex;
use serde_json::{Map, Value};

/// Parameters every Google API takes.
const COMMON: [&str; 6] = ["alt", "fields", "key", "prettyPrint", "quotaUser", "userProject"];

/// The reduced discovery document of one API.
pub(super) struct Schemas {
    methods: Vec<Method>,
    schemas: Map<String, Value>,
    patterns: HashMap<String, Regex>,
}

struct Method {
    id: String,
    http: String,
    path: Vec<String>,
    parameters: Map<String, Value>,
    request: Option<String>,
}

/// A method of the API and the parameters in the path.
pub(super) struct Matched<'a> {
    method: &'a Method,
    pub(super) path: HashMap<String, String>,
}

impl Matched<'_> {
    pub(super) fn id(&self) -> &str {
        &self.method.id
    }

    pub(super) fn get(&self, parameter: &str) -> &str {
        self.path.get(parameter).map_or("", String::as_str)
    }
}

impl Schemas {
    pub(super) fn read(document: &str) -> Self {
        let document: Value = serde_json::from_str(document).expect("the document is JSON");
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let methods = document["methods"].as_object().expect("the document has methods").iter();
        let methods = methods.map(|(id, method)| Method {
            id: id.clone(),
            http: text(&method["httpMethod"]),
            path: text(&method["path"]).split('/').map(str::to_owned).collect(),
            parameters: method["parameters"].as_object().cloned().unwrap_or_default(),
            request: method["request"].as_str().map(str::to_owned),
        });
        let mut schemas = Self {
            methods: methods.collect(),
            schemas: document["schemas"].as_object().cloned().unwrap_or_default(),
            patterns: HashMap::new(),
        };
        let mut patterns = Vec::new();
        collect_patterns(&document, &mut patterns);
        for pattern in patterns {
            let whole =
                Regex::new(&format!("^(?:{pattern})$")).expect("Google's patterns are regular expressions");
            schemas.patterns.insert(pattern, whole);
        }
        schemas
    }

    /// Finds the method of a call.
    pub(super) fn find(&self, http: &str, path: &[String]) -> Option<Matched<'_>> {
        self.methods.iter().filter(|method| method.http == http && method.path.len() == path.len()).find_map(
            |method| {
                let mut found = HashMap::new();
                for (wanted, actual) in method.path.iter().zip(path) {
                    match wanted.strip_prefix('{').and_then(|it| it.strip_suffix('}')) {
                        Some(name) => {
                            found.insert(name.to_owned(), actual.clone());
                        }
                        None if wanted == actual => {}
                        None => return None,
                    }
                }
                Some(Matched { method, path: found })
            },
        )
    }

    /// Checks path, query and body of a call.
    pub(super) fn check(
        &self,
        matched: &Matched<'_>,
        query: &[(String, String)],
        body: Option<&Value>,
    ) -> Result<(), String> {
        let method = matched.method;
        for (name, value) in &matched.path {
            if let Some(parameter) = method.parameters.get(name) {
                self.check_text(name, parameter, value)?;
            }
        }
        for (name, value) in query.iter().filter(|(name, _)| !COMMON.contains(&name.as_str())) {
            let parameter = method.parameters.get(name).filter(|it| it["location"] == "query");
            let parameter =
                parameter.ok_or_else(|| format!("Unknown name \"{name}\": Cannot bind query parameter"))?;
            self.check_text(name, parameter, value)?;
        }
        match (&method.request, body) {
            (Some(schema), Some(body)) => self.check_object(schema, body, schema),
            (None, Some(_)) => Err(format!("{} takes no body", method.id)),
            _ => Ok(()),
        }
    }

    fn check_object(&self, schema: &str, body: &Value, place: &str) -> Result<(), String> {
        let body = body.as_object().ok_or_else(|| format!("{place} is no object"))?;
        let properties = self.schemas.get(schema).and_then(|it| it["properties"].as_object());
        let properties =
            properties.ok_or_else(|| format!("schema {schema} is missing in the reduced document"))?;
        for (name, value) in body {
            let place = format!("{place}.{name}");
            let property = properties.get(name);
            let property = property
                .ok_or_else(|| format!("Unknown name \"{name}\" at '{place}': Cannot find field."))?;
            self.check_value(property, value, &place)?;
        }
        Ok(())
    }

    fn check_value(&self, property: &Value, value: &Value, place: &str) -> Result<(), String> {
        if let Some(schema) = property["$ref"].as_str() {
            return self.check_object(schema, value, place);
        }
        let wrong =
            |expected: &str| Err(format!("Invalid value at '{place}' ({value}), expected {expected}"));
        match property["type"].as_str().unwrap_or("any") {
            "string" => match value.as_str() {
                Some(text) => self.check_text(place, property, text),
                None => wrong("a string"),
            },
            "boolean" if !value.is_boolean() => wrong("a boolean"),
            "integer" if !value.is_i64() => wrong("an integer"),
            "number" if !value.is_number() => wrong("a number"),
            "array" => match value.as_array() {
                Some(items) => {
                    items.iter().try_for_each(|item| self.check_value(&property["items"], item, place))
                }
                None => wrong("an array"),
            },
            "object" => match value.as_object() {
                Some(members) => match property.get("additionalProperties") {
                    Some(each) => {
                        members.values().try_for_each(|member| self.check_value(each, member, place))
                    }
                    None => self.check_inline(property, members, place),
                },
                None => wrong("an object"),
            },
            _ => Ok(()),
        }
    }

    /// An object whose shape stands where it is used.
    fn check_inline(
        &self,
        property: &Value,
        members: &Map<String, Value>,
        place: &str,
    ) -> Result<(), String> {
        for (name, value) in members {
            let inner = &property["properties"][name];
            if inner.is_null() {
                return Err(format!("Unknown name \"{name}\" at '{place}': Cannot find field."));
            }
            self.check_value(inner, value, &format!("{place}.{name}"))?;
        }
        Ok(())
    }

    fn check_text(&self, place: &str, property: &Value, text: &str) -> Result<(), String> {
        if let Some(allowed) = property["enum"].as_array()
            && !allowed.iter().any(|it| it == text)
        {
            return Err(format!("Invalid value for field '{place}': '{text}'."));
        }
        if let Some(pattern) = property["pattern"].as_str()
            && !self.patterns[pattern].is_match(text)
        {
            return Err(format!(
                "Invalid value for field '{place}': '{text}'. Must be a match of regex '{pattern}'"
            ));
        }
        match property["format"].as_str() {
            Some("int64") if text.parse::<i64>().is_err() => {
                Err(format!("Invalid value for '{place}': '{text}'"))
            }
            Some("uint64") if text.parse::<u64>().is_err() => {
                Err(format!("Invalid value for '{place}': '{text}'"))
            }
            _ => Ok(()),
        }
    }
}

fn collect_patterns(value: &Value, patterns: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            if let Some(pattern) = members.get("pattern").and_then(Value::as_str) {
                patterns.push(pattern.to_owned());
            }
            members.values().for_each(|member| collect_patterns(member, patterns));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_patterns(item, patterns)),
        _ => {}
    }
}
