//! From what people write of degradation to what pods and the fleet go by.

use super::{Invalid, count, invalid};
use contract::{
    DegradationSettings, DegradationStage,
    settings::{NEVER, ONLY_STAGE},
};
use crds::{
    IntOrPercent,
    resilience_policy::{self as api, DegradationMode},
};
use engine::degradation::{Mode, Quorum, Settings, Stage};
use std::collections::{BTreeMap, BTreeSet};

/// Most flags that all stages together may set.
pub const MAX_FLAGS: usize = 64;
/// Most stages.
const MAX_STAGES: usize = 8;

/// What each pod of the policy goes by.
pub fn of_pod(spec: &api::Degradation) -> Result<DegradationSettings, Invalid> {
    // Taken apart as a whole, so that a new member cannot be forgotten.
    let api::Degradation { mode, forced_stage: _, enter, exit, quorum: _, min_duration: _, stages, flag_overrides } =
        spec;
    validate(spec)?;
    if *mode == DegradationMode::Disabled {
        return Ok(DegradationSettings::never());
    }
    let distance = enter.load_percent.saturating_sub(exit.load_percent);
    let stages: Vec<_> = stages.iter().map(|stage| self::stage(stage, distance)).collect();
    let only = || DegradationStage {
        name: ONLY_STAGE.to_owned(),
        load_percent: count(enter.load_percent),
        exit_load_percent: count(exit.load_percent),
        flag_overrides: overrides(flag_overrides),
    };
    let DegradationStage { load_percent, exit_load_percent, flag_overrides, .. } =
        stages.first().cloned().unwrap_or_else(only);
    Ok(DegradationSettings {
        enter_load_percent: load_percent,
        enter_for_ms: enter.r#for.millis(),
        exit_load_percent,
        exit_for_ms: exit.r#for.millis(),
        flag_overrides,
        stages,
    })
}

fn stage(spec: &api::DegradationStage, distance: i32) -> DegradationStage {
    let api::DegradationStage { name, load_percent, flag_overrides } = spec;
    DegradationStage {
        name: name.clone(),
        load_percent: count(*load_percent),
        exit_load_percent: count(load_percent.saturating_sub(distance)),
        flag_overrides: overrides(flag_overrides),
    }
}

fn overrides(spec: &[api::FlagVariant]) -> BTreeMap<String, String> {
    spec.iter().map(|over| (over.key.clone(), over.variant.clone())).collect()
}

/// What is wrong with it, if something is.
fn validate(spec: &api::Degradation) -> Result<(), Invalid> {
    let api::Degradation { enter, exit, stages, flag_overrides, forced_stage, .. } = spec;
    if exit.load_percent >= enter.load_percent {
        let message = "must be below enter.loadPercent, or the mode would flap";
        return Err(invalid("spec.degradation.exit.loadPercent", message));
    }
    if stages.len() > MAX_STAGES {
        return Err(invalid("spec.degradation.stages", format!("must be at most {MAX_STAGES}: {} are", stages.len())));
    }
    if !stages.is_empty() && !flag_overrides.is_empty() {
        return Err(invalid("spec.degradation.flagOverrides", "excludes stages: give each flag to a stage"));
    }
    let distance = enter.load_percent.saturating_sub(exit.load_percent);
    for (index, stage) in stages.iter().enumerate() {
        let path = format!("spec.degradation.stages[{index}]");
        if stages.iter().take(index).any(|other| other.name == stage.name) {
            return Err(invalid(format!("{path}.name"), format!("{} is there twice", stage.name)));
        }
        let before = index.checked_sub(1).and_then(|before| stages.get(before));
        if let Some(before) = before.filter(|before| before.load_percent >= stage.load_percent) {
            let message = format!(
                "must be more than that of the stage before it ({}): it is {}",
                before.load_percent, stage.load_percent
            );
            return Err(invalid(format!("{path}.loadPercent"), message));
        }
        if stage.load_percent <= distance {
            let message = format!(
                "must be more than {distance}, which is enter.loadPercent minus exit.loadPercent, or the stage would never end: it is {}",
                stage.load_percent
            );
            return Err(invalid(format!("{path}.loadPercent"), message));
        }
    }
    let keys: BTreeSet<_> = stages.iter().flat_map(|stage| &stage.flag_overrides).map(|over| &over.key).collect();
    if keys.len() > MAX_FLAGS {
        let message = format!("must set at most {MAX_FLAGS} flags in all: {} are set", keys.len());
        return Err(invalid("spec.degradation.stages", message));
    }
    if let Some(forced) = forced_stage.as_ref().filter(|forced| !stages.iter().any(|stage| stage.name == **forced)) {
        return Err(invalid("spec.degradation.forcedStage", format!("{forced} is not among the stages")));
    }
    Ok(())
}

/// How the fleet is degraded, and its stages with the flags of each.
pub fn of_fleet(spec: &api::Degradation) -> Result<(Settings, Vec<DegradationStage>), Invalid> {
    let of_pod = of_pod(&api::Degradation { mode: DegradationMode::Auto, ..spec.clone() })?;
    let stages = of_pod.all_stages();
    let forced = || {
        let named = spec.forced_stage.as_ref().and_then(|name| stages.iter().position(|stage| stage.name == *name));
        named.map_or(stages.len(), |index| index + 1)
    };
    let settings = Settings {
        mode: match spec.mode {
            DegradationMode::Auto => Mode::Auto,
            DegradationMode::Forced => Mode::Forced(forced()),
            DegradationMode::Disabled => Mode::Disabled,
        },
        stages: stages
            .iter()
            .map(|stage| Stage {
                name: stage.name.clone(),
                enter_percent: stage.load_percent,
                exit_percent: stage.exit_load_percent,
            })
            .collect(),
        enter_for_ms: of_pod.enter_for_ms,
        exit_for_ms: of_pod.exit_for_ms,
        min_duration_ms: spec.min_duration.millis(),
        quorum: match spec.quorum {
            IntOrPercent::Count(pods) => Quorum::Count(pods),
            IntOrPercent::Percent(percent) => Quorum::Percent(percent),
        },
        circuits: spec.enter.circuits.iter().cloned().collect(),
    };
    Ok((settings, stages))
}

/// The loads, ascending, at which something may change for the fleet. Between them nothing does.
pub fn marks(spec: &api::Degradation) -> Vec<u32> {
    let settings = of_pod(spec).ok().filter(|settings| settings.enter_load_percent != NEVER);
    let stages = settings.map(|settings| settings.all_stages()).unwrap_or_default();
    let marks: BTreeSet<_> = stages.iter().flat_map(|stage| [stage.load_percent, stage.exit_load_percent]).collect();
    marks.into_iter().collect()
}

/// The flags that it sets in all stages, each with all variants that it may take.
pub fn all_overrides(spec: &api::Degradation) -> Vec<(String, String)> {
    let all = spec.stages.iter().flat_map(|stage| &stage.flag_overrides).chain(&spec.flag_overrides);
    all.map(|over| (over.key.clone(), over.variant.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(body: &str) -> api::Degradation {
        serde_saphyr::from_str(body).unwrap()
    }

    const STAGES: &str = "stages: [{name: mail, loadPercent: 80, flagOverrides: [{key: Mail, variant: 'off'}]}, {name: cache, loadPercent: 90}]";

    #[test]
    fn without_stages_it_is_what_version_0_1_had() {
        let settings = of_pod(&spec("flagOverrides: [{key: Mail, variant: 'off'}]")).unwrap();
        let expected = json!({
            "enterLoadPercent": 80, "enterForMs": 10_000, "exitLoadPercent": 60, "exitForMs": 60_000,
            "flagOverrides": {"Mail": "off"},
        });
        assert_eq!(json!(settings), expected);
        let (fleet, stages) = of_fleet(&spec("{}")).unwrap();
        assert_eq!((stages.len(), stages[0].name.as_str()), (1, "degraded"));
        assert_eq!((fleet.quorum, fleet.min_duration_ms, fleet.mode), (Quorum::Percent(50), 60_000, Mode::Auto));
    }

    #[test]
    fn a_stage_ends_as_far_below_its_load_as_exit_is_below_enter() {
        let settings = of_pod(&spec(&format!("{{exit: {{loadPercent: 65}}, {STAGES}}}"))).unwrap();
        let ends: Vec<_> = settings.stages.iter().map(|stage| (stage.load_percent, stage.exit_load_percent)).collect();
        assert_eq!(ends, [(80, 65), (90, 75)]);
        assert_eq!((settings.enter_load_percent, settings.exit_load_percent), (80, 65), "the first, for older pods");
        assert_eq!(settings.flag_overrides.len(), 1);
        assert_eq!(marks(&spec(&format!("{{{STAGES}}}"))), [60, 70, 80, 90]);
    }

    #[rstest::rstest]
    #[case::forced("mode: Forced", Mode::Forced(2))]
    #[case::forced_up_to("{mode: Forced, forcedStage: mail}", Mode::Forced(1))]
    #[case::disabled("mode: Disabled", Mode::Disabled)]
    #[case::auto("mode: Auto", Mode::Auto)]
    fn a_person_may_decide(#[case] body: &str, #[case] expected: Mode) {
        let body = format!("{{{}, {STAGES}}}", body.trim_matches(['{', '}']));
        assert_eq!(of_fleet(&spec(&body)).unwrap().0.mode, expected);
        let never = of_pod(&spec(&body)).unwrap().all_stages().is_empty();
        assert_eq!(never, expected == Mode::Disabled, "pods of every version");
        assert_eq!(marks(&spec(&body)).is_empty(), never);
    }

    #[rstest::rstest]
    #[case::flaps("exit: {loadPercent: 80}", "spec.degradation.exit.loadPercent: must be below enter.loadPercent")]
    #[case::both(&format!("flagOverrides: [{{key: a, variant: b}}], {STAGES}"), "spec.degradation.flagOverrides: excludes stages")]
    #[case::out_of_order(
        "stages: [{name: a, loadPercent: 90}, {name: b, loadPercent: 80}]",
        "spec.degradation.stages[1].loadPercent: must be more than that of the stage before it (90): it is 80"
    )]
    #[case::twice(
        "stages: [{name: a, loadPercent: 80}, {name: a, loadPercent: 90}]",
        "spec.degradation.stages[1].name: a is there twice"
    )]
    #[case::never_ends(
        "stages: [{name: a, loadPercent: 20}]",
        "spec.degradation.stages[0].loadPercent: must be more than 20"
    )]
    #[case::no_such_stage(&format!("forcedStage: c, {STAGES}"), "spec.degradation.forcedStage: c is not among the stages")]
    fn what_cannot_be_is_refused_with_its_path(#[case] body: &str, #[case] expected: &str) {
        let error = of_pod(&spec(&format!("{{{body}}}"))).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn flags_are_bounded_over_all_stages() {
        let flags = |from: usize| {
            (from..from + 40).map(|nth| format!("{{key: f{nth}, variant: x}}")).collect::<Vec<_>>().join(", ")
        };
        let body = |second: usize| {
            format!(
                "stages: [{{name: a, loadPercent: 80, flagOverrides: [{}]}}, {{name: b, loadPercent: 90, flagOverrides: [{}]}}]",
                flags(0),
                flags(second)
            )
        };
        assert!(of_pod(&spec(&body(24))).is_ok());
        let error = of_pod(&spec(&body(25))).unwrap_err().to_string();
        assert!(error.starts_with("spec.degradation.stages: must set at most 64 flags in all: 65"), "{error}");
    }
}
