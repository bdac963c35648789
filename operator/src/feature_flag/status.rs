//! The status of a flag set.

use super::findings::{DEGRADATION, Lost, findings, note_unread};
use super::mismatch;
use crate::{
    context::Context,
    fleet::index::target_id,
    spec::{findings::Mistakes, flags::Reviewed},
    status::{
        conditions::{self, Verdict},
        target::{self, Target},
    },
};
use contract::{FlagSettings, MAX_CONFIG_BYTES, WorkloadId};
use crds::{ConditionType, FeatureFlag, FeatureFlagStatus, Reason};
use jiff::Timestamp;
use kube::ResourceExt;
use std::{sync::Arc, time::Duration};

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
    reviewed: Result<&Reviewed, &Mistakes>,
    ctx: &Context,
    now: Timestamp,
) -> Result<(FeatureFlagStatus, Option<Timestamp>), Settling> {
    let old = set.status.clone().unwrap_or_default();
    let generation = set.metadata.generation;
    let Reviewed { settings, warnings } = match reviewed {
        Ok(reviewed) => reviewed,
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
        Verdict::new(ConditionType::Accepted, true, Reason::Accepted, format!("valid{warnings}"))
    } else {
        Verdict::new(
            ConditionType::Accepted,
            true,
            Reason::Accepted,
            format!("valid; waits for {}, which do not exist yet{warnings}", missing.join(", ")),
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
    let lost = lost_keys(set, ctx, &held);
    let degraded = ctx.index.degradations_in(&namespace);
    let mut flags = findings(set, settings, &lost, &degraded, held.len(), now_ms);
    let older: usize = held.iter().map(|target| target.acknowledged.older).sum();
    for finding in flags.iter_mut().filter(|finding| older > 0 && finding.source == DEGRADATION) {
        let said = finding.message.take().into_iter().chain([format!("{older} pods of an older version ignore it")]);
        finding.message = Some(said.collect::<Vec<_>>().join("; "));
    }
    note_unread(&mut flags, &held.iter().map(|target| &target.unread_flags).collect::<Vec<_>>());
    let overridden: Vec<_> = flags.iter().filter(|flag| flag.source == "Override").collect();
    let is_powerless = |(key, flag): &(&String, &Arc<FlagSettings>)| {
        flag.active_override(now_ms).is_some() && !overridden.iter().any(|finding| finding.key == **key)
    };
    let powerless: Vec<_> = settings.flags.iter().filter(is_powerless).map(|(key, _)| key).collect();
    let mut verdicts = conditions::summarize(&accepted, &programmed, stalled, dry_run).to_vec();
    verdicts.extend([accepted, programmed]);
    let keys = overridden.iter().map(|finding| finding.key.as_str()).collect::<Vec<_>>().join(", ");
    let not_in_force = powerless
        .iter()
        .map(|key| format!("{key}, as {}", lost.get(*key).map(|has| has.join(", ")).unwrap_or_default()));
    let not_in_force = not_in_force.collect::<Vec<_>>().join("; ");
    verdicts.push(match (overridden.is_empty(), powerless.is_empty()) {
        (true, true) => Verdict::new(ConditionType::Overridden, false, Reason::NoOverride, ""),
        (true, false) => {
            let message = format!("not in force: {not_in_force}");
            Verdict::new(ConditionType::Overridden, false, Reason::OverrideNotInForce, message)
        }
        (false, true) => Verdict::new(ConditionType::Overridden, true, Reason::Overridden, keys),
        (false, false) => {
            let message = format!("{keys}. Not in force: {not_in_force}");
            Verdict::new(ConditionType::Overridden, true, Reason::Overridden, message)
        }
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
        flags: mismatch::first(mismatch::findings(set, &held), flags),
    };
    Ok((status, ends.chain(expiry).min()))
}

/// The flags that a workload has from another set, and which one has each of them where.
fn lost_keys(set: &FeatureFlag, ctx: &Context, held: &[&Target]) -> Lost {
    let mut lost = Lost::new();
    for target in held {
        let id = WorkloadId::new(set.namespace().unwrap_or_default(), target.kind, target.name.as_str());
        let sources = ctx.fleet.read(&id, |workload| workload.flag_sources.clone()).unwrap_or_default();
        for other in sources.iter().filter(|other| set.metadata.uid.as_ref() != Some(&other.uid)) {
            for key in other.keys.iter().filter(|key| set.spec.flag_spec.flags.contains_key(*key)) {
                let has = format!("{} runs by the set {}", target.name, other.name);
                lost.entry(key.clone()).or_default().push(has);
            }
        }
    }
    lost
}
