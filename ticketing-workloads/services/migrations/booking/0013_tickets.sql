-- Keys that tickets are signed with, by the beginning of their hash: notification writes its own down before it signs, booking
-- looks them up. What is signed by one that is revoked is no ticket any more.
CREATE TABLE ticket_keys (
    id         text PRIMARY KEY,
    public_key bytea NOT NULL CHECK (octet_length(public_key) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

-- A mail says that the payment is open. Services before this step skip kinds that they do not know.
ALTER TABLE outbox
    DROP CONSTRAINT outbox_kind_check,
    ADD CONSTRAINT outbox_kind_check
        CHECK (kind IN ('BookingConfirmed', 'Ticket', 'BookingCancelled', 'PaymentPending')) NOT VALID;
