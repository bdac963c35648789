//! Objects that may be unreadable. One of them must not hide all others: not when its fields make no sense, not when it is
//! nested deeper than a parser may follow, and not when it is larger than anything that it may hold. That is seen before it
//! is parsed, and what cannot be read is not kept.

use super::meta::cut;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Largest object that is read, in bytes, with everything around it: `kubectl apply` keeps a copy of it in an annotation,
/// and the API server notes who set each field.
const MAX_OBJECT_BYTES: usize = 3 * crds::feature_flag::MAX_FLAG_SPEC_BYTES;
/// Longest error that is kept, in bytes. It may quote the object.
const MAX_ERROR: usize = 1024;
/// Longest part of it that names the field, in bytes.
const MAX_PATH: usize = 512;

/// An object, or the reason why it cannot be read.
#[derive(Clone, Debug)]
pub struct Guard<K>(pub Result<K, Unreadable>);

/// An object that cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unreadable {
    /// Why not.
    pub error: String,
    /// Which object it is.
    pub metadata: ObjectMeta,
}

/// What tells which object it is. Not all of its metadata: `managedFields` are nested as deeply as the object.
#[derive(Deserialize)]
struct Named {
    metadata: Identity,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Identity {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
}

impl From<Identity> for ObjectMeta {
    fn from(identity: Identity) -> Self {
        let Identity { name, namespace, uid, resource_version, generation, creation_timestamp } = identity;
        Self { name, namespace, uid, resource_version, generation, creation_timestamp, ..Self::default() }
    }
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Guard<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Raw text is passed over without recursion, so no depth can fail what surrounds this object.
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let parsed = if text.get().len() > MAX_OBJECT_BYTES {
            Err(format!("has {} bytes, more than the {MAX_OBJECT_BYTES} that are read: split it", text.get().len()))
        } else {
            serde_json::from_str(text.get()).map_err(|error| why::<K>(text.get(), &error))
        };
        parsed.map(|object| Self(Ok(object))).or_else(|error| {
            let Named { metadata } = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
            let error = cut(&error, MAX_ERROR).to_owned();
            Ok(Self(Err(Unreadable { error, metadata: metadata.into() })))
        })
    }
}

/// Why `text` is no `K`, with the field. It is parsed a second time for that: what can be read costs nothing.
fn why<K: DeserializeOwned>(text: &str, error: &serde_json::Error) -> String {
    let Err(located) = serde_path_to_error::deserialize::<_, K>(&mut serde_json::Deserializer::from_str(text)) else {
        return error.to_string();
    };
    let error = error.to_string();
    // Nobody sees the text of which line and column are.
    let message = error.rsplit_once(" at line ").map_or(error.as_str(), |(message, _)| message);
    let unquoted = message.starts_with("invalid type: boolean") && message.ends_with("expected a string");
    let hint =
        if unquoted { "; YAML reads an unquoted on, off, yes or no as true or false: write it in quotes" } else { "" };
    format!("{}: {message}{hint}", cut(&located.path().to_string(), MAX_PATH))
}

impl<K: Resource> Resource for Guard<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &K::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &K::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &K::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn plural(dt: &K::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|unreadable| &unreadable.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|unreadable| &mut unreadable.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::FeatureFlag;

    fn list(targeting: &str) -> Vec<Guard<FeatureFlag>> {
        let object = |name: &str, targeting: &str| {
            format!(
                r#"{{"metadata":{{"name":"{name}","managedFields":[{{"fieldsV1":{targeting}}}]}},"spec":{{"flagSpec":{{"flags":{{"k":{{"state":"ENABLED","variants":{{}},"targeting":{targeting}}}}}}}}}}}"#
            )
        };
        serde_json::from_str(&format!("[{},{}]", object("odd", targeting), object("plain", "{}"))).unwrap()
    }

    #[test]
    fn one_unreadable_object_does_not_hide_the_others() {
        let bottomless = format!("{}1{}", r#"{"if":"#.repeat(10_000), "}".repeat(10_000));
        for targeting in [r#"{},"defaultVariant":5"#, bottomless.as_str()] {
            let list = list(targeting);
            assert!(list[0].0.is_err() && list[0].meta().name.as_deref() == Some("odd"));
            assert!(list[1].0.is_ok());
        }
    }

    #[rstest::rstest]
    #[case::wrong_type(
        r#"{"state": "ENABLED", "variants": {}, "defaultVariant": true}"#,
        "spec.flagSpec.flags.k.defaultVariant: invalid type: boolean `true`, expected a string; YAML reads an unquoted on, off"
    )]
    #[case::no_such_word(
        r#"{"state": "MAYBE", "variants": {}}"#,
        "spec.flagSpec.flags.k.state: unknown variant `MAYBE`, expected"
    )]
    #[case::nothing(r#"{"state": "ENABLED"}"#, "spec.flagSpec.flags.k: missing field `variants`")]
    fn the_field_is_named(#[case] flag: &str, #[case] expected: &str) {
        let text = format!(r#"{{"metadata":{{"name":"n"}},"spec":{{"flagSpec":{{"flags":{{"k":{flag}}}}}}}}}"#);
        let unreadable = serde_json::from_str::<Guard<FeatureFlag>>(&text).unwrap().0.unwrap_err();
        assert!(unreadable.error.starts_with(expected), "{unreadable}");
        assert!(!unreadable.error.contains("at line"), "{unreadable}");
    }

    #[test]
    fn the_reason_is_kept_however_long_the_path_is() {
        let deep = format!("{}1{}", r#"{"a_rather_long_name":"#.repeat(10_000), "}".repeat(10_000));
        let error = list(&deep)[0].0.as_ref().unwrap_err().error.clone();
        assert!(
            error.contains(".a_rather_long_name.a_rather_") && error.ends_with(": recursion limit exceeded"),
            "{error}"
        );
    }

    #[test]
    fn what_is_too_large_is_not_parsed() {
        let list = list(&format!("{{\"in\":[\"{}\"]}}", "x".repeat(MAX_OBJECT_BYTES)));
        let unreadable = list[0].0.as_ref().unwrap_err();
        assert!(unreadable.error.contains("more than the"), "{unreadable}");
        assert_eq!(list[0].meta().name.as_deref(), Some("odd"));
        assert!(list[1].0.is_ok());
    }
}
