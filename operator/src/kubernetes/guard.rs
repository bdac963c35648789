//! Objects that may be unreadable. One of them must not hide all others: not when its fields make no sense, and not when
//! it is nested deeper than a parser may follow.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::value::RawValue;
use std::borrow::Cow;

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
        match serde_json::from_str(text.get()) {
            Ok(object) => Ok(Self(Ok(object))),
            Err(error) => {
                let Named { metadata } = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
                Ok(Self(Err(Unreadable { error: error.to_string(), metadata: metadata.into() })))
            }
        }
    }
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
        for targeting in ["5", bottomless.as_str()] {
            let list = list(targeting);
            assert!(list[0].0.is_err() && list[0].meta().name.as_deref() == Some("odd"));
            assert!(list[1].0.is_ok());
        }
    }
}
