//! An answer with its reason, as OpenFeature's SDKs give it.

use flags::Reason;

/// The value of a flag, and why it has that value.
#[derive(Clone, Debug, PartialEq)]
pub struct Details<T> {
    /// The value; the caller's own default if there is an error, or if the flag leaves it to the caller.
    pub value: T,
    /// The variant that it is of; `None`: it is the caller's own default.
    pub variant: Option<String>,
    /// Why.
    pub reason: AnswerReason,
}

/// Why a flag was answered so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerReason {
    /// It was resolved.
    Resolved(Reason),
    /// It could not be, and so the caller's own default holds.
    Error(ErrorCode),
}

impl AnswerReason {
    /// The word that OpenFeature has for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Resolved(reason) => reason.as_str(),
            Self::Error(_) => "ERROR",
        }
    }

    /// The error, if it is one.
    pub const fn error(self) -> Option<ErrorCode> {
        match self {
            Self::Resolved(_) => None,
            Self::Error(code) => Some(code),
        }
    }
}

/// Why a flag could not be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// There is no such flag.
    FlagNotFound,
    /// Its value is of another type than was asked for.
    TypeMismatch,
    /// Its rule has no usable answer for this request.
    General,
}

impl ErrorCode {
    /// The word that OpenFeature has for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FlagNotFound => "FLAG_NOT_FOUND",
            Self::TypeMismatch => "TYPE_MISMATCH",
            Self::General => "GENERAL",
        }
    }
}
