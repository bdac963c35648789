//! The reference evaluators, each a program that answers line by line.

use crate::generator::Case;
use e2e::progress::Progress;
use e2e::sdk_clients::{self, PYTHON};
use flags::targeting::FRACTIONAL_V2;
use serde_json::{Value, json};
use std::path::PathBuf;
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
        let place = self.place();
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
            Self::Python => Command::new(place.join(PYTHON)),
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

    /// A document as it is written for us, to get what this evaluator makes of it: it calls the second version of `fractional` by the
    /// name that the third one has.
    pub fn written_for_us(self, document: &Value) -> Value {
        let mut document = document.clone();
        let mut open = vec![&mut document];
        while let Some(value) = open.pop().filter(|_| self == Self::JavaScript) {
            match value {
                Value::Array(items) => open.extend(items),
                Value::Object(members) => {
                    if let Some(split) = members.remove("fractional") {
                        members.insert(FRACTIONAL_V2.to_owned(), split);
                    }
                    open.extend(members.values_mut());
                }
                _ => {}
            }
        }
        document
    }

    const fn program(self) -> &'static str {
        match self {
            Self::JavaScript => "flagd_core.mjs",
            Self::Python => "flagd_core.py",
        }
    }

    /// Where it is, with what it needs.
    fn place(self) -> PathBuf {
        let client = match self {
            Self::JavaScript => "flagd-core-node",
            Self::Python => "flagd-core-python",
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(sdk_clients::ready(client, &Progress::new())).unwrap()
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
