//! Counts what the operators wrote, by the API server's audit log.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Reads the audit log from where it was last read to.
pub struct AuditTail {
    path: PathBuf,
    user: String,
    file: File,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
}

/// Writes by resource, such as `configmaps` or `resiliencepolicies/status`. Renewals of leases are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Writes(pub BTreeMap<String, u32>);

impl fmt::Display for Writes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = self.0.iter().map(|(resource, count)| format!("{count} {resource}")).collect();
        if each.is_empty() { f.write_str("nothing written") } else { f.write_str(&each.join(", ")) }
    }
}

impl Writes {
    /// All of them.
    pub fn total(&self) -> u32 {
        self.0.values().sum()
    }

    /// Adds those of another time.
    pub fn add_all(&mut self, other: &Self) {
        for (resource, count) in &other.0 {
            *self.0.entry(resource.clone()).or_default() += count;
        }
    }

    fn add(&mut self, line: &[u8], user: &str) {
        #[derive(Deserialize)]
        struct Entry {
            stage: String,
            user: User,
            #[serde(rename = "objectRef")]
            object: Option<ObjectRef>,
        }
        #[derive(Deserialize)]
        struct User {
            username: String,
        }
        #[derive(Deserialize)]
        struct ObjectRef {
            resource: String,
            subresource: Option<String>,
        }
        let Ok(Entry { stage, user: by, object: Some(object) }) = serde_json::from_slice(line) else { return };
        if stage == "ResponseComplete" && by.username == user && object.resource != "leases" {
            let sub = object.subresource.map(|sub| format!("/{sub}")).unwrap_or_default();
            *self.0.entry(object.resource + &sub).or_default() += 1;
        }
    }
}

impl AuditTail {
    /// Begins at the end of the log; only what `user` asks for is counted.
    pub fn new(path: &Path, user: &str) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { path: path.to_owned(), user: user.to_owned(), file, rest: Vec::new() })
    }

    /// What was written since the last call, or since the start.
    pub fn writes(&mut self) -> std::io::Result<Writes> {
        let mut writes = Writes::default();
        self.read(&mut writes)?;
        // The server starts a new file when this one is large.
        let newest = std::fs::metadata(&self.path)?;
        if newest.ino() != self.file.metadata()?.ino() {
            self.read(&mut writes)?;
            self.file = File::open(&self.path)?;
            self.rest.clear();
            self.read(&mut writes)?;
        }
        Ok(writes)
    }

    fn read(&mut self, writes: &mut Writes) -> std::io::Result<()> {
        self.file.read_to_end(&mut self.rest)?;
        let end = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for line in self.rest[..end].split(|byte| *byte == b'\n') {
            writes.add(line, &self.user);
        }
        self.rest.drain(..end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn line(user: &str, resource: &str, sub: &str, stage: &str) -> String {
        let mut object = serde_json::json!({ "resource": resource, "name": "a" });
        if !sub.is_empty() {
            object["subresource"] = sub.into();
        }
        serde_json::json!({ "stage": stage, "user": { "username": user }, "objectRef": object }).to_string() + "\n"
    }

    #[test]
    fn only_finished_writes_of_the_user_count_and_each_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        std::fs::write(&path, line("operator", "configmaps", "", "ResponseComplete")).unwrap();
        let mut tail = AuditTail::new(&path, "operator").unwrap();
        assert_eq!(tail.writes().unwrap().total(), 0, "what was there before does not count");

        let mut log = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        let half = line("operator", "secrets", "", "ResponseComplete");
        let (first, second) = half.split_at(20);
        for text in [
            line("operator", "resiliencepolicies", "status", "ResponseComplete"),
            line("admin", "configmaps", "", "ResponseComplete"),
            line("operator", "leases", "", "ResponseComplete"),
            line("operator", "configmaps", "", "ResponseStarted"),
            first.to_owned(),
        ] {
            log.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(tail.writes().unwrap().0, BTreeMap::from([("resiliencepolicies/status".to_owned(), 1)]));
        log.write_all(second.as_bytes()).unwrap();
        assert_eq!(tail.writes().unwrap().0, BTreeMap::from([("secrets".to_owned(), 1)]));
        assert_eq!(tail.writes().unwrap().total(), 0);
    }

    #[test]
    fn a_new_file_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        std::fs::write(&path, "").unwrap();
        let mut tail = AuditTail::new(&path, "operator").unwrap();
        std::fs::write(&path, line("operator", "secrets", "", "ResponseComplete")).unwrap();
        std::fs::rename(&path, dir.path().join("audit-1.log")).unwrap();
        std::fs::write(&path, line("operator", "secrets", "", "ResponseComplete")).unwrap();
        assert_eq!(tail.writes().unwrap().total(), 2);
    }
}
