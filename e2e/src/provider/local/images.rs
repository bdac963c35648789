//! Puts image archives into the containerd of every node.

use super::node::Node;
use super::record::Record;
use super::{LocalCluster, LocalError};
use crate::command::Run;
use crate::image::Archive;
use std::collections::BTreeMap;
use std::path::Path;

impl LocalCluster {
    pub(super) async fn load(&self, archive: &Path, record: &Record) -> Result<(), LocalError> {
        let image = Archive::open(archive)?;
        let mut loading = tokio::task::JoinSet::new();
        for number in 1..=record.nodes {
            let node = Node::new(number, &self.dir, record.plan);
            let image = image.clone();
            loading.spawn(async move { load_on(&node, &image).await });
        }
        let mut loaded = false;
        while let Some(done) = loading.join_next().await {
            loaded |= done.map_err(|e| LocalError::file(archive)(std::io::Error::other(e)))??;
        }
        let name = image.references.first().map_or("", String::as_str);
        self.progress.say(if loaded { format!("loaded {name}") } else { format!("{name} is already loaded") });
        Ok(())
    }
}

/// Loads it unless every one of its names stands for this content already; the answer is whether it did.
async fn load_on(node: &Node, image: &Archive) -> Result<bool, LocalError> {
    let file = node.dir.join("images.json");
    let mut known: BTreeMap<String, String> =
        std::fs::read(&file).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    let ctr = || Run::new("ctr").arg("-a").arg(node.socket()).args(["-n", "k8s.io", "images"]);
    let present = ctr().words("ls -q").output().await?;
    let is_there = |name: &String| known.get(name) == Some(&image.digest) && present.lines().any(|line| line == name);
    if image.references.iter().all(is_there) {
        return Ok(false);
    }
    ctr().words("import").arg(&image.path).run().await?;
    known.extend(image.references.iter().map(|name| (name.clone(), image.digest.clone())));
    let bytes = serde_json::to_vec_pretty(&known).map_err(|e| LocalError::file(&file)(e.into()))?;
    std::fs::write(&file, bytes).map_err(LocalError::file(&file))?;
    Ok(true)
}
