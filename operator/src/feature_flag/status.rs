//! The status of a flag set.

use super::mismatch;
use crate::{
    context::Context,
    fleet::index::target_id,
    kubernetes::meta::created_at,
    spec,
    status::{
        conditions::{self, Verdict},
        target::{self, Target},
    },
};
use contract::{FlagsSettings, MAX_CONFIG_BYTES, WorkloadId};
use crds::{ConditionType, FeatureFlag, FeatureFlagStatus, Reason, feature_flag::FlagFinding};
use jiff::Timestamp;
use kube::ResourceExt;
use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

/// The status of a set that cannot be used: what it said before stays, with the reason.
pub fn refused(
    old: FeatureFlagStatus,
    (accepted, programmed): (Verdict, Verdict),
    generation: Option<i64>,
    now: Timestamp,
) -> FeatureFlagStatus {
    let mut verdicts = conditions::summarize(&accepted, &programmed, true, false).to_vec();
    verdicts.extend([accepted, programmed]);
    let conditions = conditions::settle(&old.conditions, verdicts, generation, now);
    FeatureFlagStatus { observed_generation: generation, conditions, ..old }
}

/// There is nothing to say yet: pods are being asked or pushed to for the first moment, for at most this long.
pub struct Settling(pub Duration);

/// The status of a readable set, and when it changes by itself.
pub fn status(
    set: &FeatureFlag,
    ctx: &Context,
    now: Timestamp,
) -> Result<(FeatureFlagStatus, Option<Timestamp>), Settling> {
    let old = set.status.clone().unwrap_or_default();
    let generation = set.metadata.generation;
    let settings = match spec::flags::flags(&set.spec) {
        Ok(settings) => settings,
        Err(error) => {
            let verdicts = conditions::invalid(Reason::InvalidFlagSet, error.to_string());
            return Ok((refused(old, verdicts, generation, now), None));
        }
    };
    let namespace = set.namespace().unwrap_or_default();
    let targets: Vec<Target> =
        set.spec.target_refs.iter().map(|target| target::look_up(ctx, &target_id(&namespace, target))).collect();
    for (reference, target) in set.spec.target_refs.iter().zip(&targets).filter(|(_, target)| target.found) {
        target::show_gauges(ctx, &target_id(&namespace, reference), target);
    }
    let held: Vec<&Target> = targets.iter().filter(|target| target.found).collect();
    if let Some(wait) = held.iter().filter_map(|target| target.settles_within(&set.metadata)).min() {
        return Err(Settling(wait));
    }
    let missing: Vec<_> = targets
        .iter()
        .filter(|target| !target.found)
        .map(|target| format!("{} {}", target.kind, target.name))
        .collect();
    let accepted = if held.is_empty() && !targets.is_empty() {
        Verdict::new(
            ConditionType::Accepted,
            false,
            Reason::TargetNotFound,
            format!("there is no {}; waits for one", missing.join(", ")),
        )
    } else if missing.is_empty() {
        Verdict::new(ConditionType::Accepted, true, Reason::Accepted, "valid")
    } else {
        Verdict::new(
            ConditionType::Accepted,
            true,
            Reason::Accepted,
            format!("valid; waits for {}, which do not exist yet", missing.join(", ")),
        )
    };
    let dry_run = ctx.shared.args.dry_run;
    let (programmed, stalled) = if dry_run {
        (
            Verdict::new(
                ConditionType::Programmed,
                false,
                Reason::DryRun,
                "the operator runs dry: nothing is published",
            ),
            false,
        )
    } else if let Some(full) = held.iter().find(|target| target.left_out.contains(&set.name_any())) {
        let message = format!(
            "{}: this set does not fit beside the others into the {MAX_CONFIG_BYTES} bytes of one document; what was live from it stays: target fewer or smaller flag sets at this workload",
            full.name
        );
        (Verdict::new(ConditionType::Programmed, false, Reason::ConfigTooLarge, message), true)
    } else {
        mismatch::programmed(set, &held, target::programmed(&held, &set.metadata))
    };
    let now_ms = now.as_millisecond();
    let overridden = overridden(&settings, now_ms);
    let mut verdicts = conditions::summarize(&accepted, &programmed, stalled, dry_run).to_vec();
    verdicts.extend([accepted, programmed]);
    verdicts.push(match overridden.as_slice() {
        [] => Verdict::new(ConditionType::Overridden, false, Reason::NoOverride, ""),
        some => Verdict::new(
            ConditionType::Overridden,
            true,
            Reason::Overridden,
            some.iter().map(|f| f.key.as_str()).collect::<Vec<_>>().join(", "),
        ),
    });
    verdicts.push(mismatch::verdict(set, &held));
    let expires = set.spec.expires_at.as_ref().and_then(|expires| expires.at().ok());
    if let Some(expires) = expires {
        let over = expires <= now;
        let message = format!(
            "the set {} {}",
            if over { "should have been removed by" } else { "should be removed by" },
            expires
        );
        verdicts.push(Verdict::new(
            ConditionType::Expired,
            over,
            if over { Reason::Expired } else { Reason::NotExpired },
            message,
        ));
    }
    let ends =
        settings.flags.values().filter_map(|flag| flag.kill_switch.as_ref()?.until_ms).filter(|until| *until > now_ms);
    let ends = ends.filter_map(|until| Timestamp::from_millisecond(until).ok());
    let expiry = expires.filter(|at| *at > now);
    let status = FeatureFlagStatus {
        observed_generation: generation,
        conditions: conditions::settle(&old.conditions, verdicts, generation, now),
        programmed: Some(target::ratio(&held)),
        flag_count: i32::try_from(settings.flags.len()).ok(),
        overridden: i32::try_from(overridden.len()).ok(),
        targets: targets
            .iter()
            .map(|target| {
                let reason = if target.found { Reason::Accepted } else { Reason::TargetNotFound };
                let message = target.problem.as_ref().map(|problem| problem.message.clone());
                target::status(target, target.found, reason, message)
            })
            .collect(),
        flags: mismatch::findings(set, &held)
            .into_iter()
            .chain(overridden)
            .chain(lost_keys(set, ctx, &held))
            .take(100)
            .collect(),
    };
    Ok((status, ends.chain(expiry).min()))
}

/// The flags that another set with more say defines for the same workload.
fn lost_keys(set: &FeatureFlag, ctx: &Context, held: &[&Target]) -> Vec<FlagFinding> {
    let rank = |set: &FeatureFlag| (Reverse(set.spec.priority), created_at(set), set.name_any());
    let mut lost = BTreeMap::new();
    for target in held {
        let id = WorkloadId::new(set.namespace().unwrap_or_default(), target.kind, target.name.as_str());
        let others = ctx.index.flag_sets_of(&id);
        for other in others.iter().filter_map(|guard| guard.0.as_ref().ok()).filter(|other| rank(other) < rank(set)) {
            for key in set.spec.flag_spec.flags.keys().filter(|key| other.spec.flag_spec.flags.contains_key(*key)) {
                lost.entry(key.clone())
                    .or_insert_with(|| format!("{} runs by the set {}", target.name, other.name_any()));
            }
        }
    }
    let finding = |(key, message)| FlagFinding {
        key,
        source: "OtherSet".to_owned(),
        effective_variant: None,
        message: Some(message),
    };
    lost.into_iter().map(finding).collect()
}

/// The flags that a person has overridden and that are still so.
fn overridden(settings: &FlagsSettings, now_ms: i64) -> Vec<FlagFinding> {
    let finding = |(key, flag): (&String, &contract::FlagSettings)| {
        let over = flag.active_override(now_ms)?;
        let until = over.until_ms.and_then(|until| Timestamp::from_millisecond(until).ok());
        let until = until.map_or_else(|| "until a person takes it back".to_owned(), |until| format!("until {until}"));
        let why = if over.reason.is_empty() { String::new() } else { format!(": {}", over.reason) };
        Some(FlagFinding {
            key: key.clone(),
            source: "Override".to_owned(),
            effective_variant: Some(over.variant.clone()),
            message: Some(format!("{until}{why}")),
        })
    };
    settings.flags.iter().filter_map(finding).take(100).collect()
}
