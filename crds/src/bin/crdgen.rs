//! Writes the manifests of the custom resource definitions to where people and the chart take them from.

use std::{env, fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let root = env::args_os().nth(1).map_or_else(|| PathBuf::from("."), PathBuf::from);
    match write_all(&root) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_all(root: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    for (path, text) in crds::manifests::files()? {
        let path = root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            println!("unchanged {}", path.display());
            continue;
        }
        fs::write(&path, text)?;
        println!("wrote     {}", path.display());
    }
    Ok(())
}
