(** Least-squares linear maps from states X to targets Y

    X (d x T) and Y (o x T) hold one token per column.  A solution is any S0 with
    (Y - S0 X) X^T = 0, the normal equations; no inverse and no pseudo-inverse is
    needed, so fewer tokens than dimensions are allowed.

    Claims.
      - A solution exists.
      - It is a minimiser, with  ||Y - S X||^2 = ||Y - S0 X||^2 + ||(S0 - S) X||^2.
      - The misfit Y - S0 X is the same for every solution S0.
      - It scales with the targets: t Y has the solution t S0 and the misfit t (Y - S0 X).
        So the relative misfit of the best linear steer does not shrink with the update.
      - It is 0 when the columns of X are linearly independent: at most d tokens for a
        linear steer, d + 1 for an affine one (a row of ones added to X), one for a
        fixed vector (X the row of ones).

    Assumptions.  Any ordered field.  Moments are those of the given tokens: nothing
    is said about tokens that were not used. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics frobenius.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section LeastSquares.
Variables (R : realFieldType) (d o T : nat).
Variables (X : 'M[R]_(d, T)) (Y : 'M[R]_(o, T)).

(** S0 solves the normal equations: (Y - S0 X) X^T = 0. *)
Definition least_squares (S0 : 'M[R]_(o, d)) := (Y - S0 *m X) *m X^T = 0.

(** A solution exists. *)
Theorem least_squares_exists : exists S0, least_squares S0.
Proof.
have [Z QE] := colspanP _ _ (proj_colspan X^T).
have QXT : proj X^T = Z^T *m X by rewrite -[LHS]proj_tr QE trmx_mul trmxK.
exists (Y *m Z^T); rewrite /least_squares -mulmxA -QXT mulmxBl -mulmxA.
by rewrite proj_id subrr.
Qed.

(** ||Y - S X||^2 = ||Y - S0 X||^2 + ||S0 X - S X||^2 for every S. *)
Theorem least_squares_split S0 : least_squares S0 -> forall S,
  frob (Y - S *m X) = frob (Y - S0 *m X) + frob (S0 *m X - S *m X).
Proof.
move=> S0_ls S.
have -> : Y - S *m X = (Y - S0 *m X) + (S0 *m X - S *m X) by rewrite addrA subrK.
rewrite -mulmxBl -frob_tr -[X in _ = X + _]frob_tr -[X in _ = _ + X]frob_tr.
rewrite linearD /= frobD_orth // trmxK trmx_mul mulmxA.
by rewrite [_ *m X^T]S0_ls mul0mx.
Qed.

(** Two solutions fit the same values: S0 X = S1 X. *)
Theorem least_squares_unique S0 S1 :
  least_squares S0 -> least_squares S1 -> S0 *m X = S1 *m X.
Proof.
move=> ls0 ls1; apply/eqP; rewrite -subr_eq0; apply/eqP/frob_eq0.
have a0 := frob_ge0 (S0 *m X - S1 *m X); have b0 := frob_ge0 (S1 *m X - S0 *m X).
have := least_squares_split ls0 S1; rewrite {1}(least_squares_split ls1 S0).
rewrite -addrA -[LHS]addr0 => /addrI/esym/eqP.
by rewrite paddr_eq0 // => /andP[_ /eqP].
Qed.
(** t Y instead of Y: t S0 is a solution, and the squared misfit is t^2 as large, as is
    ||t Y||^2. *)
Theorem least_squares_scale S0 (t : R) : least_squares S0 ->
  [/\ (t *: Y - t *: S0 *m X) *m X^T = 0,
      frob (t *: Y - t *: S0 *m X) = t ^+ 2 * frob (Y - S0 *m X)
    & frob (t *: Y) = t ^+ 2 * frob Y].
Proof.
have scale m n (A : 'M[R]_(m, n)) : frob (t *: A) = t ^+ 2 * frob A.
  have -> : frob (t *: A) = \tr ((t *: A^T) *m (t *: A)).
    by congr (\tr (_ *m _)); apply/matrixP=> i j; rewrite !mxE.
  by rewrite -scalemxAl -scalemxAr scalerA mxtraceZ expr2.
move=> ls; have -> : t *: Y - t *: S0 *m X = t *: (Y - S0 *m X).
  by rewrite scalerBr scalemxAl.
by rewrite -scalemxAl [_ *m X^T]ls scaler0 !scale.
Qed.

(** Linearly independent columns of X: some S fits all targets exactly. *)
Theorem independent_tokens_fit : \rank X = T -> exists S, S *m X = Y.
Proof.
move=> rX; have full : row_full X by rewrite /row_full rX.
by exists (Y *m pinvmx X); rewrite -mulmxA mulVpmx ?mulmx1.
Qed.

End LeastSquares.
