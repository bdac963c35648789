//! Container images without a container engine.
//!
//! An image is a list of files and a little configuration, written as a docker archive that
//! `ctr images import` and `kind load image-archive` both take. The same content gives the same bytes.

mod archive;
mod layer;
mod postgres;
mod system;
mod workspace;

pub use archive::{Archive, Image};
pub use layer::{Entry, Layer};
pub use postgres::postgres_image;
pub use system::{COREDNS_IMAGE, PAUSE_IMAGE, coredns_image, pause_image};
pub(crate) use workspace::build_images;
pub use workspace::{IMAGE_BINARIES, build_workspace_images, workspace_image};

use crate::binaries::BinaryError;
use crate::command::CommandError;
use crate::filelock::LockError;
use crate::packages::PackageError;
use std::path::PathBuf;

/// An image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file that goes into the image, or the archive itself.
    #[error("cannot read or write {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// Not an archive of ours.
    #[error("{path} is not a docker archive: {reason}; write it again with `ticketwave-e2e images`")]
    NotAnArchive {
        /// The file.
        path: PathBuf,
        /// What the archive lacks.
        reason: String,
    },
    /// A program that runs in an image without libraries must be static.
    #[error("{path} is not a static binary; build it with RUSTFLAGS=\"-C target-feature=+crt-static\"")]
    NotStatic {
        /// The program.
        path: PathBuf,
    },
    /// cargo, cc or ldd failed.
    #[error("cannot build what goes into the image {image}: {source}")]
    Build {
        /// The image.
        image: String,
        /// The failed command and the end of its output.
        source: CommandError,
    },
    /// A Debian package could not be installed.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// A Go program could not be built.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// The lock of the cache could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl ImageError {
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
