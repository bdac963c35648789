//! Events of a flag set, from what changed in its status.

use crate::{
    context::Context,
    fleet::flag_set::FlagSet,
    kubernetes::{events::Event, meta::object_reference},
    status::conditions,
};
use crds::{ConditionType, EventReason, FeatureFlag, FeatureFlagStatus};
use kube::Resource;

/// Publishes what changed in a way that a person wants to hear of.
pub fn publish_events(ctx: &Context, set: &FlagSet, old: Option<&FeatureFlagStatus>, new: &FeatureFlagStatus) {
    let old_conditions = old.map(|old| old.conditions.as_slice()).unwrap_or_default();
    let reference = object_reference::<FeatureFlag>(set.meta());
    for type_ in [ConditionType::Accepted, ConditionType::Programmed] {
        let (before, after) = (conditions::find(old_conditions, type_), conditions::find(&new.conditions, type_));
        let Some(after) = after.filter(|after| before.map(|before| &before.reason) != Some(&after.reason)) else {
            continue;
        };
        let event = match after.reason.as_str() {
            "Programmed" => Some(Event::normal(EventReason::Programmed, "Publish", after.message.clone())),
            "InvalidFlagSet" if type_ == ConditionType::Accepted => {
                Some(Event::warning(EventReason::InvalidFlagSet, "Keep", after.message.clone()))
            }
            "TargetNotFound" => Some(Event::warning(EventReason::TargetNotFound, "Wait", after.message.clone())),
            "ConfigMapNotOurs" => Some(Event::warning(EventReason::ConfigMapNotOurs, "Wait", after.message.clone())),
            "ConfigTooLarge" => Some(Event::warning(EventReason::ConfigTooLarge, "Keep", after.message.clone())),
            _ => None,
        };
        if let Some(event) = event {
            ctx.shared.events.publish(&reference, &event);
        }
    }
}
