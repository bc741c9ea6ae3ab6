//! The `filters` query parameter: `{"name": {"web": true}}`, or the older `{"name": ["web"]}`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::error::{ApiError, ApiResult};

/// Filters by key; within a key any value matches, across keys all must.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Filters(BTreeMap<String, BTreeSet<String>>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    Map(BTreeMap<String, bool>),
    List(Vec<String>),
}

impl Filters {
    /// Reads the parameter; refuses keys other than `accepted`.
    pub(super) fn parse(parameter: Option<&str>, accepted: &[&str]) -> ApiResult<Self> {
        let text = parameter.unwrap_or_default();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let keys: BTreeMap<String, Values> = serde_json::from_str(text).map_err(|error| {
            ApiError::invalid(format!(
                "invalid filters: expected a JSON object of {{key: {{value: true}}}}: {error}"
            ))
        })?;
        let mut filters = BTreeMap::new();
        for (key, values) in keys {
            if !accepted.contains(&key.as_str()) {
                return Err(ApiError::invalid(format!(
                    "invalid filter '{key}': expected one of {}",
                    accepted.join(", ")
                )));
            }
            let values = match values {
                Values::Map(map) => map.into_iter().filter(|(_, on)| *on).map(|(value, _)| value).collect(),
                Values::List(list) => list.into_iter().collect(),
            };
            filters.insert(key, values);
        }
        Ok(Self(filters))
    }

    /// The values of `key`.
    pub(super) fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0.get(key).into_iter().flatten().map(String::as_str)
    }

    /// Whether there is a filter by `key`.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.values(key).next().is_some()
    }

    /// Whether `matches` holds for any value of `key`, or there is no filter by it.
    pub(super) fn any(&self, key: &str, matches: impl FnMut(&str) -> bool) -> bool {
        !self.contains(key) || self.values(key).any(matches)
    }

    /// Whether `text` starts with a value of `key`, or there is no filter by it.
    pub(super) fn prefix(&self, key: &str, text: &str) -> bool {
        self.any(key, |value| text.starts_with(value))
    }

    /// Whether `text` contains a value of `key`, or there is no filter by it. Docker reads the values as regular
    /// expressions; of those, `^` at the beginning and `$` at the end are understood.
    pub(super) fn matches(&self, key: &str, text: &str) -> bool {
        self.any(key, |value| {
            let (inner, from_start) = value.strip_prefix('^').map_or((value, false), |inner| (inner, true));
            match (inner.strip_suffix('$'), from_start) {
                (None, false) => text.contains(inner),
                (None, true) => text.starts_with(inner),
                (Some(inner), false) => text.ends_with(inner),
                (Some(inner), true) => text == inner,
            }
        })
    }

    /// Whether `labels` has all of the filter's `label` or `label=value`, under `key`.
    pub(super) fn labels(&self, key: &str, labels: &BTreeMap<String, String>) -> bool {
        self.values(key).all(|wanted| match wanted.split_once('=') {
            Some((name, value)) => labels.get(name).is_some_and(|have| have == value),
            None => labels.contains_key(wanted),
        })
    }

    /// The one boolean of `key`, where it is given.
    pub(super) fn boolean(&self, key: &str) -> ApiResult<Option<bool>> {
        let mut answer = None;
        for value in self.values(key) {
            answer = Some(match value {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                other => {
                    return Err(ApiError::invalid(format!(
                        "invalid filter '{key}={other}': expected true or false"
                    )));
                }
            });
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_read_alike() {
        let new = Filters::parse(Some(r#"{"name":{"web":true,"off":false}}"#), &["name"]).unwrap();
        let old = Filters::parse(Some(r#"{"name":["web"]}"#), &["name"]).unwrap();
        assert_eq!(new, old);
        assert!(new.prefix("name", "website"));
        assert!(!new.prefix("name", "db"));
        assert!(new.prefix("id", "anything"));
    }

    #[test]
    fn anchors_bind_a_match_to_the_ends() {
        for (value, matching) in [
            ("web", &["web", "website", "myweb", "a.web.b"][..]),
            ("^web", &["web", "website"]),
            ("web$", &["web", "myweb"]),
            ("^web$", &["web"]),
            ("^", &["web", "website", "myweb", "a.web.b"]),
        ] {
            let filters = Filters::parse(Some(&format!(r#"{{"name":["{value}"]}}"#)), &["name"]).unwrap();
            let all = ["web", "website", "myweb", "a.web.b"];
            let matched: Vec<&str> = all.into_iter().filter(|text| filters.matches("name", text)).collect();
            assert_eq!(matched, matching, "{value}");
        }
    }

    #[test]
    fn unknown_keys_and_nonsense_are_refused() {
        let unknown = Filters::parse(Some(r#"{"nmae":{"web":true}}"#), &["name", "id"]).unwrap_err();
        assert_eq!(unknown.message, "invalid filter 'nmae': expected one of name, id");
        for nonsense in ["{", "[]", "\"x\"", r#"{"name":3}"#] {
            assert_eq!(Filters::parse(Some(nonsense), &["name"]).unwrap_err().status, 400, "{nonsense}");
        }
    }

    #[test]
    fn labels_match_by_name_or_by_name_and_value() {
        let labels = BTreeMap::from([("tier".to_owned(), "web".to_owned())]);
        for (filter, matches) in [
            (r#"{"label":["tier"]}"#, true),
            (r#"{"label":["tier=web"]}"#, true),
            (r#"{"label":["tier=db"]}"#, false),
        ] {
            let filters = Filters::parse(Some(filter), &["label"]).unwrap();
            assert_eq!(filters.labels("label", &labels), matches, "{filter}");
        }
    }
}
