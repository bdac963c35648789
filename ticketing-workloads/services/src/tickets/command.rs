//! `ticketing verify` and `ticketing ticket-key`: for an entrance without a network, and for the person who
//! looks after the keys.

use super::code::{Code, CodeError, Ticket};
use super::keys::{self, KeyError, KeyId, MAX_FILE_BYTES, PublicKeys, SigningKey};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Which codes, and whose signatures count.
#[derive(Clone, Debug, clap::Args)]
pub struct Verify {
    /// The codes, as a scanner reads them from tickets.
    #[arg(required = true)]
    pub codes: Vec<String>,
    /// File of the public keys that are accepted (PEM), one after the other.
    #[arg(long, env = "TICKET_PUBLIC_KEYS_FILE", value_name = "FILE")]
    pub public_keys: PathBuf,
}

/// What is done with keys.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum TicketKey {
    /// Writes a new private key to a file that does not exist yet, and prints its public key.
    New {
        /// The file, which its owner alone may read.
        file: PathBuf,
    },
    /// Prints the public keys of files with a private key, for `ticketing verify --public-keys`.
    Public {
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

/// Why a command could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}: {source}; a key that is there is never overwritten", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Key { path: PathBuf, source: KeyError },
}

/// A code that was looked at.
#[derive(Debug, PartialEq, Eq)]
pub struct Verified {
    result: Result<(Ticket, KeyId), CodeError>,
}

impl Verified {
    pub fn is_valid(&self) -> bool {
        self.result.is_ok()
    }
}

impl std::fmt::Display for Verified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.result {
            Ok((Ticket { booking, event, seat, of }, key)) => {
                write!(f, "valid: event {event}, seat {seat} of {of}, booking {booking}, key {key}")
            }
            Err(why) => write!(f, "not valid: {why}"),
        }
    }
}

/// Looks at each code in turn. What has become of its booking only `GET /api/tickets/<code>` knows.
pub fn verify(settings: &Verify) -> Result<Vec<Verified>, CommandError> {
    let path = &settings.public_keys;
    let keys = PublicKeys::from_pem(&read(path)?);
    let keys = keys.map_err(|source| CommandError::Key { path: path.clone(), source })?;
    let verify = |text: &String| {
        let code = Code::read(text.trim());
        Verified { result: code.and_then(|code| Ok((code.verify(&keys)?, code.key()))) }
    };
    Ok(settings.codes.iter().map(verify).collect())
}

/// Makes or reads keys; the answer is public.
pub fn ticket_key(settings: &TicketKey) -> Result<String, CommandError> {
    match settings {
        TicketKey::New { file } => {
            let wrong = |source| CommandError::Key { path: file.clone(), source };
            let text = keys::generate().map_err(wrong)?;
            let mut options = std::fs::OpenOptions::new();
            let opened = options.write(true).create_new(true).mode(0o600).open(file);
            let written = opened.and_then(|mut opened| opened.write_all(text.as_bytes()));
            written.map_err(|source| CommandError::Write { path: file.clone(), source })?;
            Ok(SigningKey::from_pem(text.as_bytes()).map_err(wrong)?.public_key().to_pem())
        }
        TicketKey::Public { files } => files.iter().try_fold(String::new(), |all, path| {
            let key = SigningKey::from_pem(&read(path)?);
            let key = key.map_err(|source| CommandError::Key { path: path.clone(), source })?;
            Ok(all + &key.public_key().to_pem())
        }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CommandError> {
    let mut text = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text));
    read.map_err(|source| CommandError::Read { path: path.to_owned(), source })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_key_is_made_and_what_it_signs_is_verified() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new, public] = ["old.pem", "new.pem", "public.pem"].map(|name| folder.path().join(name));
        for file in [&old, &new] {
            ticket_key(&TicketKey::New { file: file.clone() }).unwrap();
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&old).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        let again = ticket_key(&TicketKey::New { file: old.clone() }).unwrap_err().to_string();
        assert!(again.contains("never overwritten"), "{again}");

        std::fs::write(&public, ticket_key(&TicketKey::Public { files: vec![old.clone(), new.clone()] }).unwrap())
            .unwrap();
        let ticket = Ticket { booking: Uuid::from_u128(3), event: Uuid::from_u128(1), seat: 2, of: 4 };
        let code = |file: &Path| ticket.sign(&SigningKey::from_pem(&std::fs::read(file).unwrap()).unwrap());
        let forged = ticket.sign(&SigningKey::from_seed(&[1; 32]).unwrap());
        let codes = vec![code(&old), format!("{}\n", code(&new)), forged, "nonsense".to_owned()];
        let verified = verify(&Verify { codes, public_keys: public.clone() }).unwrap();
        let words: Vec<_> = verified.iter().map(ToString::to_string).collect();
        assert_eq!(verified.iter().map(Verified::is_valid).collect::<Vec<_>>(), [true, true, false, false]);
        let seat = "seat 2 of 4, booking 00000000-0000-0000-0000-000000000003";
        assert!(
            words[0].starts_with("valid: event 00000000-0000-0000-0000-000000000001") && words[0].contains(seat),
            "{words:?}"
        );
        assert!(words[2].starts_with("not valid: it is signed with the key"), "{words:?}");

        let private = verify(&Verify { codes: Vec::new(), public_keys: old }).unwrap_err().to_string();
        assert!(private.contains("it has a private key"), "{private}");
    }
}
