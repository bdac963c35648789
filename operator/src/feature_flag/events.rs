//! Events of a flag set, from what changed in its status.

use crate::{
    context::Context,
    kubernetes::{events::Event, meta::object_reference, watches::FlagSet},
    status::conditions,
};
use crds::{
    FeatureFlag, FeatureFlagStatus,
    condition::types::{ACCEPTED, PROGRAMMED},
};
use kube::Resource;

/// Publishes what changed in a way that a person wants to hear of.
pub fn publish_events(ctx: &Context, set: &FlagSet, old: Option<&FeatureFlagStatus>, new: &FeatureFlagStatus) {
    let old_conditions = old.map(|old| old.conditions.as_slice()).unwrap_or_default();
    let reference = object_reference::<FeatureFlag>(set.meta());
    for type_ in [ACCEPTED, PROGRAMMED] {
        let (before, after) = (conditions::find(old_conditions, type_), conditions::find(&new.conditions, type_));
        let Some(after) = after.filter(|after| before.map(|before| &before.reason) != Some(&after.reason)) else {
            continue;
        };
        let event = match after.reason.as_str() {
            "Programmed" => Some(Event::normal("Programmed", "Publish", after.message.clone())),
            "InvalidFlagSet" if type_ == ACCEPTED => {
                Some(Event::warning("InvalidFlagSet", "Keep", after.message.clone()))
            }
            "TargetNotFound" => Some(Event::warning("TargetNotFound", "Wait", after.message.clone())),
            "ConfigMapNotOurs" => Some(Event::warning("ConfigMapNotOurs", "Wait", after.message.clone())),
            "ConfigTooLarge" => Some(Event::warning("ConfigTooLarge", "Keep", after.message.clone())),
            _ => None,
        };
        if let Some(event) = event {
            ctx.shared.events.publish(&reference, &event);
        }
    }
}
