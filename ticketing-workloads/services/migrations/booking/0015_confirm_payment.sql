-- A mail asks the buyer to confirm the payment. It is a row of its own, so that it goes once, also where the mail that the payment
-- is open has been sent before. Services that do not know the kind skip it.
ALTER TABLE outbox
    DROP CONSTRAINT outbox_kind_check,
    ADD CONSTRAINT outbox_kind_check
        CHECK (kind IN ('BookingConfirmed', 'Ticket', 'BookingCancelled', 'PaymentPending', 'ConfirmPayment')) NOT VALID;
