(** The best fixed vector is the mean of the targets

    Y (o x T) holds the target shifts, one token per column; a fixed vector v adds the
    same v at every token.

    Claim.  With m the mean of the columns of Y,
      ||Y - v 1^T||^2 = ||Y||^2 - T ||m||^2 + T ||m - v||^2 ,
    so v = m is best and leaves ||Y||^2 - T ||m||^2; divided by T, the mean of ||δ||^2
    less the square of the mean shift.

    Assumptions.  At least one token; any ordered field.

    Not said here.  The mean is that of the given tokens. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics frobenius least_squares.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section FixedVector.
Variables (R : realFieldType) (o T : nat) (Y : 'M[R]_(o, T.+1)).

(** The mean of the columns of Y. *)
Definition column_mean : 'cV[R]_o := T.+1%:R^-1 *: (Y *m const_mx 1).

(** v at every token: the columns of v 1^T are all v. *)
Definition at_every_token (v : 'cV[R]_o) : 'M[R]_(o, T.+1) := v *m const_mx 1.

(** 1^T 1 = T *)
Lemma ones_ones :
  (const_mx 1 : 'rV[R]_T.+1) *m (const_mx 1 : 'cV_T.+1) = T.+1%:R%:M.
Proof.
apply/matrixP=> i j; rewrite !ord1 !mxE (eq_bigr (fun=> 1)) => [|k _].
  by rewrite sumr_const card_ord mulr1n.
by rewrite !mxE mulr1.
Qed.

(** ||v 1^T||^2 = T ||v||^2 *)
Lemma frob_at_every_token v : frob (at_every_token v) = T.+1%:R * sqn v.
Proof.
rewrite frobE (eq_bigr (fun=> sqn v)) => [|j _].
  by rewrite sumr_const card_ord mulr_natl.
congr sqn; apply/colP=> i; rewrite /at_every_token !mxE big_ord1.
by rewrite [const_mx _ _ _]mxE mulr1.
Qed.

(** The mean solves the normal equations of a fixed vector. *)
Lemma mean_least_squares : least_squares (const_mx 1 : 'rV_T.+1) Y column_mean.
Proof.
rewrite /least_squares trmx_const mulmxBl -mulmxA ones_ones mul_mx_scalar.
by rewrite scalerA mulfV ?pnatr_eq0 // scale1r subrr.
Qed.

(** ||Y - v 1^T||^2 = ||Y||^2 - T ||m||^2 + T ||m - v||^2, m the mean: the mean is the
    best fixed vector, and it leaves ||Y||^2 - T ||m||^2. *)
Theorem best_fixed_vector v :
  frob (Y - at_every_token v)
    = frob Y - T.+1%:R * sqn column_mean + T.+1%:R * sqn (column_mean - v).
Proof.
rewrite (least_squares_split mean_least_squares v) -mulmxBl.
have := least_squares_split mean_least_squares 0.
rewrite !mul0mx !subr0 -!/(at_every_token _) !frob_at_every_token => ->.
by rewrite addrK.
Qed.

End FixedVector.
