//! Builds from source: `e2e/tools/*/go.mod` pin the versions, Go does the rest.

use super::{BinaryError, KUBERNETES_MINOR, Tool};
use crate::checkout;
use crate::command::{Run, find_program};
use crate::progress::Progress;
use std::path::Path;

/// Which tools module, which package in it, and how long it takes with nothing cached (two cores).
fn recipe(tool: Tool) -> (&'static str, String, &'static str) {
    match tool {
        Tool::Helm => ("helm", "helm.sh/helm/v4/cmd/helm".into(), "2 min"),
        Tool::Kind => ("kind", "sigs.k8s.io/kind".into(), "10 s"),
        Tool::CoreDns => ("coredns", ".".into(), "2 min"),
        _ => {
            let duration = if tool == Tool::ApiServer { "4 min" } else { "1 min" };
            ("kubernetes", format!("k8s.io/kubernetes/cmd/{}", tool.program()), duration)
        }
    }
}

/// Builds a static program to `fresh`.
pub(super) async fn build(tool: Tool, fresh: &Path, progress: &Progress) -> Result<(), BinaryError> {
    let (program, version) = (tool.program(), tool.version());
    let go = find_program("go").ok_or(BinaryError::NoGo { program, version })?;
    let (module, package, duration) = recipe(tool);
    let module = checkout::root().join("e2e/tools").join(module);
    let text = format!("building {program} {version} from source (first time only, about {duration})");
    let build = Run::new(go)
        .args(["build", "-mod=readonly", "-trimpath", "-ldflags", &linker_flags(tool), "-o"])
        .arg(fresh)
        .arg(&package)
        .dir(&module)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .run();
    progress.during(&text, build).await.map_err(|source| BinaryError::Build { program, module, source })
}

fn linker_flags(tool: Tool) -> String {
    let version = tool.version();
    let (major, minor) = KUBERNETES_MINOR;
    match tool {
        Tool::CoreDns | Tool::Kind => "-s -w".into(),
        Tool::Helm => format!("-s -w -X helm.sh/helm/v4/internal/version.version={version}"),
        _ => {
            let at = "-X k8s.io/component-base/version";
            format!(
                "-s -w {at}.gitVersion={version} {at}.gitMajor={major} {at}.gitMinor={minor} \
                 {at}.gitCommit=unknown {at}.gitTreeState=clean {at}.buildDate=2026-01-01T00:00:00Z"
            )
        }
    }
}
