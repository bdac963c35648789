//! The reference evaluators, each a program that answers line by line.

use crate::generator::Case;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// An evaluator of flagd that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// @openfeature/flagd-core, of npm.
    JavaScript,
    /// openfeature-flagd-core, of PyPI.
    Python,
}

impl Reference {
    /// Its answers about each of `cases`. What it needs is installed.
    pub fn answers(self, cases: &[Case]) -> Vec<Vec<Value>> {
        let place = self.install();
        let requests = tempfile::NamedTempFile::new_in(&place).unwrap();
        let mut text = String::new();
        for case in cases {
            let asks: Vec<_> = case
                .asks
                .iter()
                .map(|ask| json!({"key": ask.key, "type": ask.type_, "context": ask.context}))
                .collect();
            text += &json!({"document": case.document, "now": super::NOW, "asks": asks}).to_string();
            text.push('\n');
        }
        std::fs::write(requests.path(), text).unwrap();
        let mut command = match self {
            Self::JavaScript => Command::new("node"),
            Self::Python => Command::new(place.join("venv/bin/python")),
        };
        command
            .arg(place.join(self.program()))
            .current_dir(&place)
            .stdin(std::fs::File::open(requests.path()).unwrap());
        let output = run(&mut command);
        let answers: Vec<Vec<Value>> = output
            .stdout
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(answers.len(), cases.len());
        answers
    }

    const fn program(self) -> &'static str {
        match self {
            Self::JavaScript => "flagd_core.mjs",
            Self::Python => "flagd_core.py",
        }
    }

    /// Installs it under the build's folder, if this version of it is not there yet.
    fn install(self) -> PathBuf {
        let source = e2e::checkout::root().join("e2e/reference");
        let (name, files): (_, &[&str]) = match self {
            Self::JavaScript => ("node", &["package.json", "package-lock.json"]),
            Self::Python => ("python", &["requirements.txt"]),
        };
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("flag-reference").join(name);
        std::fs::create_dir_all(&place).unwrap();
        std::fs::copy(source.join(self.program()), place.join(self.program())).unwrap();
        let is_installed = place.join("installed").exists()
            && files.iter().all(|file| std::fs::read(source.join(file)).ok() == std::fs::read(place.join(file)).ok());
        if is_installed {
            return place;
        }
        let _ = std::fs::remove_file(place.join("installed"));
        for file in files {
            std::fs::copy(source.join(file), place.join(file)).unwrap();
        }
        match self {
            Self::JavaScript => {
                run(Command::new("npm")
                    .args(["ci", "--no-audit", "--no-fund", "--ignore-scripts"])
                    .current_dir(&place));
            }
            Self::Python => {
                run(Command::new("python3").args(["-m", "venv", "--clear", "venv"]).current_dir(&place));
                let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"];
                run(Command::new(place.join("venv/bin/python")).args(pip).current_dir(&place));
            }
        }
        std::fs::write(place.join("installed"), "").unwrap();
        place
    }
}

fn run(command: &mut Command) -> Output {
    let program = command.get_program().to_owned();
    let output = command.stderr(Stdio::piped()).output().unwrap_or_else(|error| {
        panic!(
            "{} is needed for this test ({error}): install Node 20 or newer with npm, and Python 3.10 or newer with venv (Debian: nodejs npm python3-venv)",
            program.display()
        )
    });
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}
